"""The least of kernels, to see whether Triton's interpreter works: some releases do not beside every NumPy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def count(n: int) -> list[int]:
    """0 to n - 1."""
    out = torch.full((n,), -1, dtype=torch.int32)
    _count[(1,)](out, n)
    return out.tolist()


@triton.jit
def _count(out, n):
    for i in range(n):
        tl.store(out + i, i)
