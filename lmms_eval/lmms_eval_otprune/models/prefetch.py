"""Prepares the next items in a background thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(work: Callable[[Item], Result], items: Iterable[Item], depth: int = 2) -> Iterator[tuple[Item, Result]]:
    """Yield (item, work(item)) in order, while a thread already works on the next items.

    A single thread, because the tasks' code that reads images may not be thread-safe.

    Parameters
    ----------
    work : callable
        Its exceptions are raised at the turn of their item.
    items : iterable
    depth : int
        Items prepared in advance, >= 1.
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
