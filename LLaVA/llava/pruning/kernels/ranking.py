"""A value and an index as one number, so that a maximum breaks its ties."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lowest_of_largest(values, indices):
    """The rank of the largest value, among equals that of the lowest index, as PyTorch's argmax: NaN is above all.

    values float32 and indices int32, both (n,); a rank is int64, ordered as (value, -index) and never 0.
    """
    # -0.0 equals 0.0, but its bits do not.
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(values != values, 0x7FFFFFFF, ordered)
    return tl.max((ordered.to(tl.int64) << 32) | (0x7FFFFFFF - indices).to(tl.int64), axis=0)


@triton.jit
def rank_index(rank):
    """The index in a rank, int32."""
    return 0x7FFFFFFF - (rank & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def rank_value(rank):
    """The value in a rank, float32; NaN may have other bits than it had."""
    ordered = (rank >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
