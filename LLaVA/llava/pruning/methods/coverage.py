"""Coverage: the subset that is nearest to all tokens, each of them counted with its nearest kept one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import Pruner
from llava.pruning.kernels import fused, gram
from llava.pruning.tokens import VisualTokens


def squared_distances(features: torch.Tensor) -> torch.Tensor:
    """``|x_i - x_j|^2`` of every pair of tokens: (B, N, D) -> (B, N, N), float32."""
    with torch.autocast(features.device.type, enabled=False):
        x = features.float()
        # Differences stay, and what they are computed from gets smaller.
        products = gram(x - x.mean(dim=1, keepdim=True))
        norms = products.diagonal(dim1=-2, dim2=-1).clone()
        return products.mul_(-2).add_(norms.unsqueeze(-1)).add_(norms.unsqueeze(-2)).clamp_min_(0)


def facility_select(
    similarity: torch.Tensor, k: int, weight: torch.Tensor | None = None, served: torch.Tensor | None = None
) -> torch.Tensor:
    """Greedy facility location: every step takes the token that serves all tokens best beside those already taken.

    A token i is served as well as the most similar token taken so far serves it, ``m_i``. Taking j gains
    ``w_j sum_i max(0, S_ij - m_i)``. Without weights the sum of all ``m_i`` reaches at least ``1 - 1/e`` of what the
    best k tokens would add to it. O(k N^2), no host synchronisation.

    Parameters
    ----------
    similarity : Tensor (B, N, N), floating
        Symmetric.
    k : int
        1 <= k <= N -> (B, k), int64, in the order of selection; ties go to the lowest index.
    weight : Tensor (B, N), floating, optional
        Of each token as a choice, >= 0; 1 unless given.
    served : Tensor (B, N), floating, optional
        How well each token is served before anything is taken; 0 unless given.

    Source: Nemhauser, Wolsey and Fisher, "An analysis of approximations for maximizing submodular set functions",
    Mathematical Programming 14, 1978.
    """
    order = fused("facility_select", similarity, k, weight, served)
    if order is not None:
        return order
    batch, n, _ = similarity.shape
    rows = torch.arange(batch, device=similarity.device)
    served = similarity.new_zeros(batch, n) if served is None else served
    taken = torch.zeros(batch, n, dtype=torch.bool, device=similarity.device)
    order = torch.empty(batch, k, dtype=torch.int64, device=similarity.device)
    for step in range(k):
        gain = (similarity - served.unsqueeze(-1)).clamp_min_(0).sum(dim=1)  # (B, N)
        if weight is not None:
            gain *= weight
        chosen = gain.masked_fill_(taken, -math.inf).argmax(dim=-1)  # (B,)
        order[:, step] = chosen
        taken.scatter_(1, chosen.unsqueeze(-1), True)
        served = torch.maximum(served, similarity[rows, chosen])
    return order


@dataclass(frozen=True, kw_only=True)
class Coverage(Pruner):
    """Minimise ``sum_i min_{j kept} |x_i - x_j|^2`` greedily.

    The minimum is N times the squared 2-Wasserstein distance from all tokens to the kept ones where these may have any
    weights: the semi-relaxed transport cost, which is never above the distance between uniformly weighted sets. The
    first token is the medoid.
    """

    source: ClassVar[str] = "greedy facility location on squared distances, a baseline of this package"
    cost: ClassVar[str] = "O(N^2 D), greedy O(k N^2) at most"

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        similarity = squared_distances(tokens.features).neg_()
        return facility_select(similarity, tokens.k, served=similarity.amin(dim=-1))
