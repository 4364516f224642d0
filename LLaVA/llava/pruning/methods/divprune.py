"""DivPrune: the subset whose closest pair is as far apart as possible."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import Pruner
from llava.pruning.kernels import fused
from llava.pruning.similarity import cosine_similarity
from llava.pruning.tokens import VisualTokens


def max_min_select(distance: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy max-min diversity: every step takes the token that is farthest from those already taken.

    The first one is the token whose nearest neighbour is farthest. O(k N) after the distances, with a running minimum
    and no host synchronisation. Distances (B, N, N), symmetric, the diagonal is not read; 1 <= k <= N -> (B, k), int64,
    in the order of selection; ties go to the lowest index.

    Source: DivPrune, CVPR 2025.
    """
    fast = fused("max_min_select", distance, k)
    if fast is not None:
        return fast
    batch, n, _ = distance.shape
    rows = torch.arange(batch, device=distance.device)
    others = distance.clone()
    others.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    chosen = others.amin(dim=-1).argmax(dim=-1)  # (B,)
    nearest = distance.new_full((batch, n), math.inf)  # distance to the closest token taken so far
    order = [chosen]
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, distance[rows, chosen])
        nearest.scatter_(1, chosen.unsqueeze(-1), -math.inf)
        chosen = nearest.argmax(dim=-1)
        order.append(chosen)
    return torch.stack(order, dim=-1)


@dataclass(frozen=True, kw_only=True)
class DivPrune(Pruner):
    """Max-min diversity under the cosine distance ``1 - cos``."""

    source: ClassVar[str] = "DivPrune, arXiv 2503.02175"
    venue: ClassVar[str] = "CVPR"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "O(N^2 D), greedy O(k N)"

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        return max_min_select(cosine_similarity(tokens.features).neg_().add_(1), tokens.k)
