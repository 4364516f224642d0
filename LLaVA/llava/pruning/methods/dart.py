"""DART: keep what repeats least of a few pivot tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import Pruner
from llava.pruning.similarity import products
from llava.pruning.tokens import VisualTokens


def least_like_pivots(similarity: torch.Tensor, pivots: torch.Tensor, k: int) -> torch.Tensor:
    """Pivots that are visual tokens, and then, pivot by pivot, the tokens that are least similar to it.

    Parameters
    ----------
    similarity : Tensor (B, P, N), floating
        Of every pivot to every token; the visual pivots come first, and text may follow.
    pivots : Tensor (B, p), int64
        Which tokens the visual pivots are, p <= P.
    k : int
        1 <= k <= N. The pivots share what is left of it beside themselves equally; the first ones take one more.

    Returns
    -------
    Tensor (B, k), int64
        In the order of selection; ties go to the lowest index.

    Source: DART, EMNLP 2025.
    """
    batch, count, n = similarity.shape
    taken = torch.zeros(batch, n, dtype=torch.bool, device=similarity.device)
    order = [pivots[:, :k]]
    taken.scatter_(1, order[0], True)
    share, more = divmod(k - order[0].shape[1], count)
    for pivot in range(count):
        left = similarity[:, pivot].masked_fill(taken, math.inf)
        order.append(left.argsort(dim=-1, stable=True)[:, : share + (pivot < more)])
        taken.scatter_(1, order[-1], True)
    return torch.cat(order, dim=1)


@dataclass(frozen=True, kw_only=True)
class DART(Pruner):
    """Pivots are the visual tokens of the largest L1 norm; each in turn keeps the tokens least similar to it.

    Attributes
    ----------
    visual_pivots : int
        At least 1.
    """

    source: ClassVar[str] = "DART, arXiv 2502.11494"
    venue: ClassVar[str] = "EMNLP"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "O(p N D) for p pivots"
    licence: ClassVar[str] = "Apache-2.0"

    visual_pivots: int = 4

    def __post_init__(self):
        if self.visual_pivots < 1:
            raise ValueError(f"DART's visual_pivots must be at least 1, not {self.visual_pivots}")

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        x = tokens.features.float()
        ranked = x.abs().sum(dim=-1).argsort(dim=-1, descending=True, stable=True)
        pivots = ranked[:, : self.visual_pivots]
        unit = torch.nn.functional.normalize(x, dim=-1)
        chosen = unit.gather(1, pivots.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return least_like_pivots(products(chosen, unit), pivots, tokens.k)
