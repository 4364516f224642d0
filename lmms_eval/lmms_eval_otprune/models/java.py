"""Java: the caption metrics run on it, and nothing else does."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

CAPTION_TASKS = ("coco2017_cap_val", "flickr30k_test", "nocaps_val")
PACKAGE = "default-jre-headless"


@cache
def java_works() -> bool:
    """Whether a Java runtime answers (some systems install a ``java`` that only asks for one)."""
    if shutil.which("java") is None:
        return False
    return subprocess.run(["java", "-version"], capture_output=True, timeout=60, check=False).returncode == 0


def needs_java(task: str) -> bool:
    """Whether a benchmark, or its embedded counterpart, is scored with Java."""
    return task.removeprefix("mini_") in CAPTION_TASKS
