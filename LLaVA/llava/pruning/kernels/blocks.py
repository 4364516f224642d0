"""Greedy steps on a GPU whose blocks share an image: their shape, their launch, and how they agree on a choice."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Shape(NamedTuple):
    """How one image is spread over a GPU.

    Attributes
    ----------
    blocks : int
        Thread blocks an image; one waits for nobody, several agree on every choice.
    columns : int
        Tokens a block, a power of two.
    rows : int
        Rows of a matrix that a block reads at once, a power of two.
    warps : int
        Warps of 32 threads a block.
    """

    blocks: int
    columns: int
    rows: int
    warps: int

    def images_at_once(self, batch: int, multiprocessors: int) -> int:
        """How many images a launch takes: all, or as many as the GPU holds where their blocks wait for each other."""
        return batch if self.blocks == 1 else multiprocessors // self.blocks


def launch(
    steps: Any, matrix: torch.Tensor, k: int, shape: Shape, images: int, *others: Any, **constants: Any
) -> torch.Tensor:
    """What all steps of every image take, so many images per launch: (B, k), int64, in the order of selection.

    ``steps`` is a kernel of the matrix (B, N, N) and ``others``; then bids (B, k, blocks) of zeros and order (B, k),
    int64; the launch's first image, N, k and blocks; and the ``constants`` beside those of the shape.
    """
    batch, n, _ = matrix.shape
    matrix = matrix.contiguous()
    several = shape.blocks > 1
    bids = torch.zeros(batch, k if several else 0, shape.blocks, dtype=torch.int64, device=matrix.device)
    order = torch.empty(batch, k, dtype=torch.int64, device=matrix.device)
    with torch.cuda.device_of(matrix):  # Triton launches on the current device
        for first in range(0, batch, images):
            steps[(min(images, batch - first) * shape.blocks,)](
                matrix,
                *others,
                bids,
                order,
                first,
                n,
                k,
                shape.blocks,
                SEVERAL=several,
                COLUMNS=shape.columns,
                ROWS=shape.rows,
                LANES=32 * shape.warps,
                num_warps=shape.warps,
                enable_fp_fusion=True,
                # Blocks that wait for each other have to run at the same time; the driver refuses a launch that cannot.
                launch_cooperative_grid=several,
                **constants,
            )
    return order


@triton.jit
def agree(bid, bids, block, blocks, LANES: tl.constexpr):
    """The largest of all blocks' bids: every block leaves its own and waits for those of the others.

    A bid is never 0, which stands for one that has not come yet. One thread reads one bid, with LANES threads a block.
    """
    # Released after the barrier, the bid says that this block has written what the others read.
    tl.atomic_xchg(bids + block, bid, sem="release")
    lanes = tl.arange(0, LANES)
    there = lanes < blocks
    seen = tl.atomic_add(bids + lanes, tl.zeros_like(lanes).to(tl.int64), mask=there, sem="acquire")
    seen = tl.where(there, seen, bid)
    while tl.min(tl.where(seen == 0, 0, 1), axis=0) == 0:
        seen = tl.atomic_add(bids + lanes, tl.zeros_like(lanes).to(tl.int64), mask=there, sem="acquire")
        seen = tl.where(there, seen, bid)
    return tl.max(seen, axis=0)
