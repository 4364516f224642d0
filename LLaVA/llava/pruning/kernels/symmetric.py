"""Products of normalised tokens on a GPU's half-precision matrix units, to float32's precision.

A number is split into the float16 nearest to it and a float16 that holds what is left, scaled up so that it keeps its
digits: 22 bits together. Three float16 products then stand for one of float32, and since all of them are of the form
``x x^T``, only tiles of the lower triangle are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llava.pruning import kernels

DEPTH = 32
"""Numbers of a token that a tile reads at once; rows are padded to a multiple of it."""

LARGEST = 2.0**15
"""What split numbers are scaled to at most; float16 ends at 65504."""

REST = tl.constexpr(2.0**11)
"""How much the second part is scaled up: the first has 11 bits."""


class Split(NamedTuple):
    """Numbers in two parts, ``(high + low / REST) / scale``.

    Attributes
    ----------
    high, low : Tensor (B, N, pitch), float16
        Zero behind the row's own numbers.
    scale : float
        A power of two.
    """

    high: torch.Tensor
    low: torch.Tensor
    scale: float


class Tiling(NamedTuple):
    """How a product is cut up.

    Attributes
    ----------
    side : int
        Rows and columns of a tile.
    warps : int
        Warps of 32 threads a tile.
    stages : int
        Loads under way, in steps of `DEPTH`.
    """

    side: int
    warps: int
    stages: int


TILINGS = (Tiling(128, 8, 3), Tiling(64, 4, 4), Tiling(32, 4, 5))


def tiling_for(n: int, multiprocessors: int) -> Tiling:
    """The largest tiles of which one image gives every multiprocessor one, else the smallest.

    Whatever the batch is: matrix units may add up the products of other tiles in another order.
    """
    for tiling in TILINGS:
        if _tiles(n, tiling.side) >= multiprocessors:
            return tiling
    return TILINGS[-1]


def ot_kernel(features: torch.Tensor, gamma: float) -> torch.Tensor:
    """OTPrune's kernel ``I + gamma S S^T``: (B, N, D), floating -> (B, N, N), float32."""
    # S is a sum of D products of at most 1. The columns are not kept beside it and the kernel.
    similarity = split_product(normalised(features, dim=1), largest=features.shape[-1])
    return product(similarity, factor=gamma, add_identity=True)


def cosine_similarity(features: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of tokens: (B, N, D), floating -> (B, N, N), float32; 0 beside a token of zeros."""
    return product(normalised(features, dim=2))


def normalised(x: torch.Tensor, dim: int) -> Split:
    """Rows (dim 2) or columns (dim 1) of every image at length 1, split: x (B, N, D), floating."""
    batch, n, d = x.shape
    x = x.contiguous()
    pitch = DEPTH * triton.cdiv(d, DEPTH)
    high, low = (x.new_empty(batch, n, pitch, dtype=torch.float16) for _ in range(2))
    if dim == 1:
        lines, steps, smallest = 32, 64, kernels.SMALLEST_NORM
        extents, strides, grid = (d, pitch, n, n), (1, d, 1, pitch), triton.cdiv(pitch, lines)
    else:
        lines, steps, smallest = 4, 512, 1e-12  # as torch.nn.functional.normalize
        extents, strides, grid = (n, n, d, pitch), (d, 1, pitch, 1), triton.cdiv(n, lines)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _normalise[(grid, batch)](
            x,
            high,
            low,
            n * d,
            n * pitch,
            *extents,
            *strides,
            LARGEST,
            smallest,
            LINES=lines,
            STEPS=steps,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return Split(high, low, LARGEST)


def product(x: Split, factor: float = 1.0, add_identity: bool = False) -> torch.Tensor:
    """``factor x x^T``, plus the identity where that is wanted, of every image: (B, N, N), float32."""
    batch, n, _ = x.high.shape
    found = torch.empty(batch, n, n, dtype=torch.float32, device=x.high.device)
    _multiply_tiles(x, found, None, factor, add_identity)
    return found


def split_product(x: Split, largest: int) -> Split:
    """``x x^T`` of every image, (B, N, N), split again; ``largest`` is what no value of it exceeds."""
    batch, n, _ = x.high.shape
    high, low = (x.high.new_empty(batch, n, DEPTH * triton.cdiv(n, DEPTH)) for _ in range(2))
    scale = LARGEST / triton.next_power_of_2(largest)
    _multiply_tiles(x, high, low, scale, add_identity=False)
    return Split(high, low, scale)


def _multiply_tiles(
    x: Split, found: torch.Tensor, rest: torch.Tensor | None, factor: float, add_identity: bool
) -> None:
    """Write ``factor x x^T`` (B, N, width), in two parts if there is a rest to write."""
    batch, n, pitch = x.high.shape
    tiling = tiling_for(n, kernels.multiprocessors(x.high.device))
    with torch.cuda.device_of(x.high):  # Triton launches on the current device
        _multiply[(_tiles(n, tiling.side), batch)](
            x.high,
            x.low,
            found,
            found if rest is None else rest,
            n,
            pitch,
            found.shape[-1],
            factor / x.scale**2,
            TILE=tiling.side,
            DEPTH=DEPTH,
            ADD_IDENTITY=add_identity,
            SPLIT=rest is not None,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            enable_fp_fusion=True,
        )


def _tiles(n: int, side: int) -> int:
    rows = triton.cdiv(n, side)
    return rows * (rows + 1) // 2


@triton.jit
def _split(values):
    """The two float16 parts of float32 values."""
    high = values.to(tl.float16)
    return high, ((values - high.to(tl.float32)) * REST).to(tl.float16)


@triton.jit
def _normalise(
    x,
    high,
    low,
    size,
    padded_size,
    lines,
    padded_lines,
    steps,
    padded_steps,
    line,
    step,
    padded_line,
    padded_step,
    scale,
    smallest,
    LINES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Some lines of one image at length ``scale``, split.

    A line is what is normalised, a row or a column: ``steps`` numbers of x that lie ``step`` apart, ``line`` behind
    those of the line before; in high and low padded with zeros to other extents and strides. An image has ``size``.
    """
    image = tl.program_id(1).to(tl.int64)
    x += image * size
    high += image * padded_size
    low += image * padded_size
    own = (tl.program_id(0) * LINES + tl.arange(0, LINES)).to(tl.int64)[:, None]
    squares = tl.zeros((LINES, STEPS), dtype=tl.float32)
    for begin in range(0, steps, STEPS):
        at = begin + tl.arange(0, STEPS)[None, :]
        values = tl.load(x + own * line + at * step, mask=(own < lines) & (at < steps), other=0.0).to(tl.float32)
        squares += values * values
    length = tl.sqrt(tl.sum(squares, axis=1))[:, None]
    # NaN stays NaN.
    length = tl.where(length < smallest, smallest, length)
    for begin in range(0, padded_steps, STEPS):
        at = begin + tl.arange(0, STEPS)[None, :]
        values = tl.load(x + own * line + at * step, mask=(own < lines) & (at < steps), other=0.0).to(tl.float32)
        first, second = _split(values / length * scale)
        there = (own < padded_lines) & (at < padded_steps)
        tl.store(high + own * padded_line + at * padded_step, first, mask=there)
        tl.store(low + own * padded_line + at * padded_step, second, mask=there)


@triton.jit
def _multiply(
    high,
    low,
    found,
    found_rest,
    n,
    pitch,
    width,
    factor,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    ADD_IDENTITY: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of the lower triangle and its mirror image.

    high and low (B, N, pitch), float16; found (B, N, width), float32, or float16 and with its rest where SPLIT.
    """
    # The tile's row r is the largest with r (r + 1) / 2 <= its number; a rounded root may miss it by one.
    number = tl.program_id(0)
    r = ((tl.sqrt(8.0 * number + 1.0) - 1.0) / 2.0).to(tl.int32)
    r += tl.where((r + 1) * (r + 2) // 2 <= number, 1, 0)
    r -= tl.where(r * (r + 1) // 2 > number, 1, 0)
    c = number - r * (r + 1) // 2

    image = tl.program_id(1).to(tl.int64)
    high += image * n * pitch
    low += image * n * pitch
    found += image * n * width
    found_rest += image * n * width
    rows = (r * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (c * TILE + tl.arange(0, TILE)).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    left = rows[:, None] * pitch + depth[None, :]
    right = columns[None, :] * pitch + depth[:, None]
    row_there, column_there = (rows < n)[:, None], (columns < n)[None, :]
    whole = tl.zeros((TILE, TILE), dtype=tl.float32)
    rest = tl.zeros((TILE, TILE), dtype=tl.float32)
    for _ in range(0, pitch, DEPTH):
        left_high = tl.load(high + left, mask=row_there, other=0.0)
        right_high = tl.load(high + right, mask=column_there, other=0.0)
        left_low = tl.load(low + left, mask=row_there, other=0.0)
        right_low = tl.load(low + right, mask=column_there, other=0.0)
        whole = tl.dot(left_high, right_high, whole)
        rest = tl.dot(left_high, right_low, rest)
        rest = tl.dot(left_low, right_high, rest)
        left += DEPTH
        right += DEPTH
    whole = (whole + rest / REST) * factor
    if ADD_IDENTITY:
        whole += tl.where(rows[:, None] == columns[None, :], 1.0, 0.0)
    _store(found, found_rest, whole, rows, columns, n, width, SPLIT)
    if r != c:
        _store(found, found_rest, whole.T, columns, rows, n, width, SPLIT)


@triton.jit
def _store(found, rest, values, rows, columns, n, width, SPLIT: tl.constexpr):
    there = (rows < n)[:, None] & (columns < width)[None, :]
    places = rows[:, None] * width + columns[None, :]
    if SPLIT:
        first, second = _split(values)
        tl.store(found + places, first, mask=there)
        tl.store(rest + places, second, mask=there)
    else:
        tl.store(found + places, values, mask=there)
