"""Java: the caption metrics run on it, and nothing else does."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

from llava.benchmarks import benchmark_of

PACKAGE = "default-jre-headless"


@cache
def java_works() -> bool:
    """Whether a Java runtime answers (some systems install a ``java`` that only asks for one)."""
    if shutil.which("java") is None:
        return False
    return subprocess.run(["java", "-version"], capture_output=True, timeout=60, check=False).returncode == 0


def needs_java(task: str) -> bool:
    """Whether a task is a benchmark of captions, or its embedded counterpart."""
    benchmark = benchmark_of(task)
    return benchmark is not None and benchmark.captions
