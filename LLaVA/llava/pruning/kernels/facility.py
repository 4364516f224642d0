"""Greedy facility location on a GPU: every step of every image in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llava.pruning import kernels
from llava.pruning.kernels.blocks import Shape, agree, launch
from llava.pruning.kernels.ranking import lowest_of_largest, rank_index


def shape_for(n: int, multiprocessors: int) -> Shape:
    """As many blocks an image as the GPU holds at once, down to 128 tokens a block: a step reads all of the matrix.

    Whatever the batch is, as in `greedy.shape_for`.
    """
    columns = max(32, triton.next_power_of_2(min(n, max(128, triton.cdiv(n, multiprocessors)))))
    return Shape(triton.cdiv(n, columns), columns, rows=max(1, 8192 // columns), warps=8)


def facility_select(
    similarity: torch.Tensor, k: int, weight: torch.Tensor | None, served: torch.Tensor | None
) -> torch.Tensor:
    """Greedy facility location: (B, N, N), float32 -> (B, k), int64, in the order of selection.

    Launches do not depend on k, and the host waits for nothing.
    """
    multiprocessors = kernels.multiprocessors(similarity.device)
    shape = shape_for(similarity.shape[-1], multiprocessors)
    images = shape.images_at_once(len(similarity), multiprocessors)
    return select_in_shape(similarity, k, weight, served, shape, images)


def select_in_shape(
    similarity: torch.Tensor,
    k: int,
    weight: torch.Tensor | None,
    served: torch.Tensor | None,
    shape: Shape,
    images: int,
) -> torch.Tensor:
    """`facility_select` with the work spread in this shape, so many images per launch."""
    batch, n, _ = similarity.shape
    # Every block keeps its own copy of how well each token is served.
    now = similarity.new_zeros(batch, shape.blocks, n)
    if served is not None:
        now.copy_(served[:, None])
    weights = now if weight is None else weight.float().contiguous()
    return launch(_facility, similarity, k, shape, images, weights, now, WEIGHTED=weight is not None)


@triton.jit(do_not_specialize=["first"])
def _facility(
    similarity,
    weight,
    served,
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
    WEIGHTED: tl.constexpr,
):
    """Steps of `facility_select` for one block's columns of one image, counted from the ``first`` on.

    similarity (B, N, N), weight (B, N) and served (B, blocks, N), float32; bids (B, k, blocks) of zeros and order
    (B, k), int64.
    """
    image = (first + tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    similarity += image * n * n
    served += (image * blocks + block) * n
    bids += image * k * blocks
    order += image * k
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n
    gone = columns >= n
    factor = tl.load(weight + image * n + columns, mask=inside, other=0.0) if WEIGHTED else 1.0
    latest = served  # the row of what was taken last; before the first, nothing changes
    for step in range(k):
        gain = tl.zeros((COLUMNS,), dtype=tl.float32)
        for begin in range(0, n, ROWS):
            rows = begin + tl.arange(0, ROWS)
            there = rows < n
            best = tl.load(served + rows, mask=there, other=float("inf"))
            best = tl.maximum(best, tl.load(latest + rows, mask=there, other=float("inf")))
            tl.store(served + rows, best, mask=there)
            tile = tl.load(
                similarity + rows.to(tl.int64)[:, None] * n + columns[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            )
            gain += tl.sum(tl.maximum(tile - best[:, None], 0.0), axis=0)
        bid = lowest_of_largest(tl.where(gone, float("-inf"), gain * factor), columns)
        if SEVERAL:
            bid = agree(bid, bids + step * blocks, block, blocks, LANES)
        chosen = rank_index(bid)
        if block == 0:
            tl.store(order + step, chosen.to(tl.int64))
        gone = gone | (columns == chosen)
        latest = similarity + chosen.to(tl.int64) * n
        # The next step reads in other threads than wrote it how well a token is served.
        tl.debug_barrier()
