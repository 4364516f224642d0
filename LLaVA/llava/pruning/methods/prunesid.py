"""PruneSID: groups by principal components, and in each group what does not repeat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llava.pruning.methods.groups import select_by_quota
from llava.pruning.methods.importance import AttentionRanked, most_important
from llava.pruning.similarity import cosine_similarity
from llava.pruning.tokens import VisualTokens

ITERATIONS = 4
"""Of the subspace iteration that finds the components."""


def principal_loadings(features: torch.Tensor, count: int) -> torch.Tensor:
    """How strongly each token belongs to each of the leading principal components of ``sigmoid(features)``.

    The features (B, N, D) are the samples and the tokens the variables: every token is centred over its features. The
    components are found by subspace iteration from a fixed start, as close to the exact ones as their spectrum lets it
    come. Absolute loadings (B, N, count), float32, the strongest component first; 1 <= count <= min(N, D).

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53, 2011.
    """
    x = torch.sigmoid(features.float())
    x = x - x.mean(dim=-1, keepdim=True)
    start = torch.randn(x.shape[-1], count, generator=torch.Generator().manual_seed(0))
    basis, _ = torch.linalg.qr(x @ start.to(x.device, non_blocking=True))  # (B, N, count)
    for _ in range(ITERATIONS):
        basis, _ = torch.linalg.qr(x @ (x.mT @ basis))
    inside = basis.mT @ x  # (B, count, D)
    _, rotation = torch.linalg.eigh(inside @ inside.mT)
    return (basis @ rotation).flip(-1).abs()


def suppress(similarity: torch.Tensor, order: torch.Tensor, group: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Non-maximum suppression in every group (B, N): who is too similar to a better one that stays goes.

    ``order`` (B, N) has every token once, the best first; a similarity (B, N, N) above ``limit`` (B,) is too similar.
    Returns whether a token stays, (B, N), bool.
    """
    rows = torch.arange(len(order), device=order.device)
    rivals = (similarity > limit[:, None, None]) & (group.unsqueeze(-1) == group.unsqueeze(-2))
    rivals.diagonal(dim1=-2, dim2=-1).fill_(False)
    stays = torch.ones_like(order, dtype=torch.bool)
    for best in order.unbind(dim=1):
        # Whoever comes later in the order cannot suppress this one any more.
        stays &= ~(rivals[rows, best] & stays[rows, best].unsqueeze(-1))
    return stays


@dataclass(frozen=True, kw_only=True)
class PruneSID(AttentionRanked):
    """Tokens are grouped by their strongest principal component; groups share the budget by what is distinct in them.

    A group's tokens are suppressed whose cosine to a better one of it exceeds ``18 k / N`` times the mean cosine of all
    pairs (k / 32 for 576 tokens). Each group gets one token, and of the rest a share in proportion to what was not
    suppressed, at most 5 ceil(k / 64); what is left goes round. The published code draws at random for the components.

    Attributes
    ----------
    group_size : int
        Kept tokens for each component: there are k / group_size of them.
    importance : str
        What makes a token better: "loading", its weight in its component (published for Qwen2-VL), or encoder attention
        as of every method that ranks by it (published for LLaVA).
    """

    source: ClassVar[str] = "PruneSID, arXiv 2603.09480"
    venue: ClassVar[str] = "ICLR"
    year: ClassVar[int] = 2026
    cost: ClassVar[str] = "O(N^2 D + N k D)"

    importance: Literal["loading", "auto", "cls", "received"] = "loading"
    group_size: int = 4

    def __post_init__(self):
        if self.group_size < 1:
            raise ValueError(f"PruneSID's group_size must be at least 1, not {self.group_size}")

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        n, width = tokens.features.shape[1:]
        loadings = principal_loadings(tokens.features, max(1, min(tokens.k // self.group_size, n, width)))
        strongest, group = loadings.max(dim=-1)  # (B, N)
        score = strongest if self.importance == "loading" else self.attention(tokens)
        order = most_important(score)
        similarity = cosine_similarity(tokens.features)
        pairs = similarity.sum(dim=(-2, -1)) - similarity.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        stays = suppress(similarity, order, group, 18 * tokens.k / n * pairs / (n * (n - 1)))

        member = group.unsqueeze(-1) == torch.arange(loadings.shape[-1], device=group.device)  # (B, N, G)
        size, distinct = member.sum(dim=1), (member & stays.unsqueeze(-1)).sum(dim=1)  # (B, G)
        share = distinct / distinct.sum(dim=-1, keepdim=True)
        rest = tokens.k - (size > 0).sum(dim=-1, keepdim=True)
        quota = (size > 0) + (share * rest).floor().long()
        quota = quota.clamp_max(5 * math.ceil(tokens.k / 64))
        first = stays.gather(1, order).int().argsort(dim=-1, descending=True, stable=True)
        return select_by_quota(order.gather(1, first), group, quota, distinct, tokens.k)
