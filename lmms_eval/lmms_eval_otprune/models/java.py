"""Java, which only the caption metrics need."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

from llava.benchmarks import benchmark_of

PACKAGE = "default-jre-headless"


@cache
def java_works() -> bool:
    """Whether there is a Java runtime (some systems have a ``java`` that only asks to install one)."""
    if shutil.which("java") is None:
        return False
    return subprocess.run(["java", "-version"], capture_output=True, timeout=60, check=False).returncode == 0


def needs_java(task: str) -> bool:
    """Whether a task scores captions."""
    benchmark = benchmark_of(task)
    return benchmark is not None and benchmark.captions
