"""The golden data kept with the tests stays small enough for everyone's clone."""

from __future__ import annotations

from golden import SMALL_COPY

MOST_BYTES = 2_000_000


def test_the_small_copy_is_small():
    sizes = {path: path.stat().st_size for path in SMALL_COPY.rglob("*") if path.is_file()}
    assert sizes and sum(sizes.values()) <= MOST_BYTES
