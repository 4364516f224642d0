"""Digests of files, cached: reading a checkpoint takes longer than many runs."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from llava.files import cache_folder, read_json, write_json

WORTH_A_WORD = 2**30
SETTLED = 2.0
"""Seconds. A newer file may be rewritten without a change of its size and time."""


def file_digests(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, in hexadecimal digits.

    Digests are cached in the user's cache folder by path, size, modification time and inode. If several processes need
    them at the same time, one reads the files.
    """
    with _memory() as memory:
        known = read_json(memory) if memory is not None else None
        known = known if isinstance(known, dict) else {}
        found = {str(path.resolve()): path.stat() for path in paths}
        marks = {path: f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino} " for path, stat in found.items()}
        missing = [path for path, mark in marks.items() if not str(known.get(path)).startswith(mark)]
        if sum(found[path].st_size for path in missing) > WORTH_A_WORD:
            print(f"Reading {Path(missing[0]).parent} once, to know it again", file=sys.stderr, flush=True)
        now = time.time()
        known |= {path: marks[path] + _sha256(path) for path in missing}
        fresh = {path for path in missing if now - found[path].st_mtime < SETTLED}
        if memory is not None and set(missing) - fresh:
            kept = {path: entry for path, entry in known.items() if path not in fresh and Path(path).exists()}
            with suppress(OSError):
                write_json(memory, kept)
        return [known[str(path.resolve())].split()[-1] for path in paths]


@contextmanager
def _memory() -> Iterator[Path | None]:
    """The locked cache file; None where there can be none."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "digests.lock")
        lock.acquire()
    except (OSError, NotImplementedError):
        yield None
        return
    try:
        yield folder / "digests.json"
    finally:
        lock.release()


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
