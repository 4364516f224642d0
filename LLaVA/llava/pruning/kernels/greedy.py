"""The greedy Cholesky on a GPU: every step of every image in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llava.pruning import kernels
from llava.pruning.kernels.ranking import lowest_of_largest, rank_index, rank_value


class Shape(NamedTuple):
    """How one image is spread over a GPU.

    Attributes
    ----------
    blocks : int
        Thread blocks an image; one waits for nobody, several agree on every choice.
    columns : int
        Tokens a block, a power of two.
    rows : int
        Rows of the Cholesky factor that a block reads at once, a power of two.
    warps : int
        Warps of 32 threads a block.
    """

    blocks: int
    columns: int
    rows: int
    warps: int


def shape_for(n: int, multiprocessors: int) -> Shape:
    """One block an image of up to 1024 tokens; beyond, as many as the GPU holds at once, down to 128 tokens a block.

    Whatever the batch is: another shape adds up in another order, and rounding would tip near-ties.
    """
    share = n if n <= 1024 else max(128, triton.cdiv(n, multiprocessors))
    columns = max(32, triton.next_power_of_2(share))
    warps = min(16, max(4, columns // 16))
    # 32 numbers of the factor a thread are in flight.
    return Shape(triton.cdiv(n, columns), columns, max(1, 1024 * warps // columns), warps)


def greedy_select(kernel: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy maximisation of ``log det K_C``: (B, N, N), float32 -> (B, k), int64, in greedy order.

    Launches do not depend on k, and the host waits for nothing. A launch takes all images, or as many as the GPU holds
    at once where an image's blocks wait for each other.
    """
    multiprocessors = kernels.multiprocessors(kernel.device)
    shape = shape_for(kernel.shape[-1], multiprocessors)
    return select_in_shape(kernel, k, shape, len(kernel) if shape.blocks == 1 else multiprocessors // shape.blocks)


def select_in_shape(kernel: torch.Tensor, k: int, shape: Shape, images: int) -> torch.Tensor:
    """`greedy_select` with the work spread in this shape, so many images per launch."""
    batch, n, _ = kernel.shape
    kernel = kernel.contiguous()
    pitch = 32 * triton.cdiv(n, 32)  # a row begins where a wide load can
    factor = kernel.new_empty(batch, k, pitch)
    bids = torch.zeros(batch, k if shape.blocks > 1 else 0, shape.blocks, dtype=torch.int64, device=kernel.device)
    order = torch.empty(batch, k, dtype=torch.int64, device=kernel.device)
    with torch.cuda.device_of(kernel):  # Triton launches on the current device
        for first in range(0, batch, images):
            _greedy[(min(images, batch - first) * shape.blocks,)](
                kernel,
                factor,
                bids,
                order,
                first,
                n,
                pitch,
                k,
                shape.blocks,
                EXHAUSTED=kernels.EXHAUSTED,
                SEVERAL=shape.blocks > 1,
                COLUMNS=shape.columns,
                ROWS=shape.rows,
                LANES=32 * shape.warps,
                num_warps=shape.warps,
                enable_fp_fusion=True,
                # Blocks that wait for each other have to run at the same time; the driver refuses a launch that cannot.
                launch_cooperative_grid=shape.blocks > 1,
            )
    return order


@triton.jit(do_not_specialize=["first"])
def _greedy(
    kernel,
    factor,
    bids,
    order,
    first,
    n,
    pitch,
    k,
    blocks,
    EXHAUSTED: tl.constexpr,
    SEVERAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Steps of `greedy_select` for one block's columns of one image, counted from the ``first`` on.

    kernel (B, N, N) and factor (B, k, pitch), float32; bids (B, k, blocks) of zeros and order (B, k), int64.
    """
    image = (first + tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    kernel += image * n * n
    factor += image * k * pitch
    bids += image * k * blocks
    order += image * k
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n
    gain = tl.load(kernel + columns.to(tl.int64) * (n + 1), mask=inside, other=float("-inf"))
    exhausted = 0.0
    latest = factor
    for step in range(k):
        best = lowest_of_largest(gain, columns)
        if SEVERAL:
            best = agree(best, bids + step * blocks, block, blocks, LANES)
        chosen = rank_index(best)
        pivot = rank_value(best)
        exhausted = tl.where(step == 0, EXHAUSTED * pivot, exhausted)
        if block == 0:
            tl.store(order + step, chosen.to(tl.int64))
        row = tl.load(kernel + chosen.to(tl.int64) * n + columns, mask=inside, other=0.0)
        explained = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for begin in range(0, step, ROWS):
            rows = begin + tl.arange(0, ROWS)
            earlier = rows < step
            lines = factor + rows.to(tl.int64) * pitch
            # Other blocks wrote the chosen column: it is read past this multiprocessor's own cache.
            weights = tl.load(lines + chosen, mask=earlier, other=0.0, cache_modifier=".cg")
            tile = tl.load(lines[:, None] + columns[None, :], mask=earlier[:, None] & inside[None, :], other=0.0)
            explained += weights[:, None] * tile
        row -= tl.sum(explained, axis=0)
        row = tl.where(pivot > exhausted, row / tl.sqrt(pivot), 0.0)
        tl.store(latest + columns, row, mask=inside)
        latest += pitch
        gain = tl.where(columns == chosen, float("-inf"), gain - row * row)
        # The next step reads this row in other threads than wrote it.
        tl.debug_barrier()


@triton.jit
def agree(bid, bids, block, blocks, LANES: tl.constexpr):
    """The largest of all blocks' bids: every block leaves its own and waits for those of the others.

    A bid is never 0, which stands for one that has not come yet. One thread reads one bid, with LANES threads a block.
    """
    # Released after the barrier, the bid says that this block's rows of the factor are written.
    tl.atomic_xchg(bids + block, bid, sem="release")
    lanes = tl.arange(0, LANES)
    there = lanes < blocks
    seen = tl.atomic_add(bids + lanes, tl.zeros_like(lanes).to(tl.int64), mask=there, sem="acquire")
    seen = tl.where(there, seen, bid)
    while tl.min(tl.where(seen == 0, 0, 1), axis=0) == 0:
        seen = tl.atomic_add(bids + lanes, tl.zeros_like(lanes).to(tl.int64), mask=there, sem="acquire")
        seen = tl.where(there, seen, bid)
    return tl.max(seen, axis=0)
