"""Java, which only the caption metrics need."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache, lru_cache
from typing import Any

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


def remember_tokens() -> None:
    """Have captions tokenised once that are scored again: a task's references are the same for every row of a table.

    For all of lmms-eval's caption metrics in this process; each time takes a Java process.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    @lru_cache(maxsize=32)
    def tokenized(captions: tuple[tuple[Any, tuple[str, ...]], ...]) -> dict[Any, list[str]]:
        return plain(PTBTokenizer(), {image: [{"caption": text} for text in texts] for image, texts in captions})

    def tokenize(_: PTBTokenizer, captions: dict[Any, list[dict[str, Any]]]) -> dict[Any, list[str]]:
        key = tuple((image, tuple(one["caption"] for one in several)) for image, several in captions.items())
        return {image: list(texts) for image, texts in tokenized(key).items()}

    plain = PTBTokenizer.tokenize
    PTBTokenizer.tokenize = tokenize
