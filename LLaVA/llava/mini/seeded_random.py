"""Random choices that are the same on every machine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

# Part of every seed: a change to what a seed means is a new world, and then the shipped checkpoint, the recorded
# hashes and every table change with it.
WORLD_VERSION = "1"

T = TypeVar("T")


class SeededRandom:
    """Random choices that are the same on every machine and Python version.

    Only `random.Random.random()` is used, the one method whose sequence Python promises to keep; the choices are
    made from it here. The stream depends on the ``str()`` of each part of the key, in order, and the world's version.
    """

    def __init__(self, *key: object) -> None:
        text = "/".join([WORLD_VERSION, *map(str, key)])
        self._random = random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")).random

    def below(self, n: int) -> int:
        """An integer in ``0 .. n - 1``, uniformly."""
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """An integer in ``low .. high``, both included, uniformly."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of a hundred cases."""
        return self.below(100) < percent

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`, uniformly."""
        return items[self.below(len(items))]

    def weighted(self, weights: dict[T, int]) -> T:
        """One key of `weights`, in proportion to its integer weight."""
        left = self.below(sum(weights.values()))
        for item, weight in weights.items():
            left -= weight
            if left < 0:
                return item
        raise ValueError(f"weights must have a positive sum, got {weights}")

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """`items` in random order (Fisher-Yates), as a new list."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """`k` different entries of `items`, in random order."""
        if k > len(items):
            raise ValueError(f"cannot take {k} of {len(items)} items")
        return self.shuffled(items)[:k]
