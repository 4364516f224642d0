"""Max-min insertion on a GPU: every step of every image in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llava.pruning.kernels.ranking import lowest_of_largest, rank_index


def max_min_select(distance: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy max-min diversity: (B, N, N), float32 -> (B, k), int64, in the order of selection.

    Launches do not depend on k, and the host waits for nothing. A step reads one row: one block an image is enough.
    """
    batch, n, _ = distance.shape
    distance = distance.contiguous()
    others = distance.clone()
    others.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
    lonely = others.amin(dim=-1).argmax(dim=-1)  # (B,)
    order = torch.empty(batch, k, dtype=torch.int64, device=distance.device)
    columns = max(32, triton.next_power_of_2(n))
    warps = min(16, max(4, columns // 128))
    with torch.cuda.device_of(distance):  # Triton launches on the current device
        _max_min[(batch,)](distance, lonely, order, n, k, COLUMNS=columns, num_warps=warps, enable_fp_fusion=True)
    return order


@triton.jit
def _max_min(distance, lonely, order, n, k, COLUMNS: tl.constexpr):
    """Steps of `max_min_select` for one image: distance (B, N, N), float32; lonely (B,) and order (B, k), int64."""
    image = tl.program_id(0).to(tl.int64)
    distance += image * n * n
    order += image * k
    columns = tl.arange(0, COLUMNS)
    inside = columns < n
    nearest = tl.where(inside, float("inf"), float("-inf"))  # distance to the closest token taken so far
    chosen = tl.load(lonely + image).to(tl.int32)
    for step in range(k):
        tl.store(order + step, chosen.to(tl.int64))
        row = tl.load(distance + chosen.to(tl.int64) * n + columns, mask=inside, other=float("-inf"))
        nearest = tl.where(columns == chosen, float("-inf"), tl.minimum(nearest, row))
        chosen = rank_index(lowest_of_largest(nearest, columns))
