"""The greedy Cholesky on a GPU: every step of every image in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llava.pruning import kernels
from llava.pruning.kernels.blocks import Shape, agree, launch
from llava.pruning.kernels.ranking import lowest_of_largest, rank_index, rank_value


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

    Launches do not depend on k, and the host waits for nothing.
    """
    multiprocessors = kernels.multiprocessors(kernel.device)
    shape = shape_for(kernel.shape[-1], multiprocessors)
    return select_in_shape(kernel, k, shape, shape.images_at_once(len(kernel), multiprocessors))


def select_in_shape(kernel: torch.Tensor, k: int, shape: Shape, images: int) -> torch.Tensor:
    """`greedy_select` with the work spread in this shape, so many images per launch."""
    batch, n, _ = kernel.shape
    pitch = 32 * triton.cdiv(n, 32)  # a row begins where a wide load can
    factor = kernel.new_empty(batch, k, pitch)
    return launch(_greedy, kernel, k, shape, images, factor, pitch, EXHAUSTED=kernels.EXHAUSTED)


@triton.jit(do_not_specialize=["first"])
def _greedy(
    kernel,
    factor,
    pitch,
    bids,
    order,
    first,
    n,
    k,
    blocks,
    SEVERAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    EXHAUSTED: tl.constexpr,
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
