"""Work that is done in the background, before its results are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(work: Callable[[Item], Result], items: Iterable[Item], depth: int = 2) -> Iterator[tuple[Item, Result]]:
    """Every item with what ``work`` makes of it, in order, while another thread goes on with the items that follow.

    One thread does it all: tasks' own code, which reads the images, is not made for several.

    Parameters
    ----------
    work : callable
        What it raises is raised where its item's turn comes.
    items : iterable
    depth : int
        How many items may be prepared and not used yet, >= 1.
    """
    waiting: deque = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > depth:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
