"""One run at a time writes into a result folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(folder: Path, machine_rank: int) -> Iterator[None]:
    """Hold a result folder, which is made first, inside the block; the system frees it when the process dies.

    The machines of one run share the folder, so each rank has a lock of its own.

    Raises
    ------
    OSError
        If another run holds it, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".run-{machine_rank}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"another run is writing into {folder}: wait for its end, or choose another --output"
        ) from None
    except NotImplementedError:
        # Some network file systems have no locks.
        pass
    try:
        yield
    finally:
        lock.release()
