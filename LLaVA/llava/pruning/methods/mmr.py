"""MMR: important tokens that are unlike those already kept, by maximal marginal relevance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llava.pruning.methods.importance import AttentionRanked, unit_interval
from llava.pruning.similarity import cosine_similarity
from llava.pruning.tokens import VisualTokens


def marginal_relevance_select(
    importance: torch.Tensor, similarity: torch.Tensor, k: int, balance: float
) -> torch.Tensor:
    """Greedily the token of the largest ``balance * importance_j - (1 - balance) * max_{i taken} similarity_ij``.

    The first token is the most important one. O(k N), no host synchronisation. Importance (B, N) and symmetric
    similarity (B, N, N), floating; 1 <= k <= N and 0 <= balance <= 1 -> (B, k), int64, in the order of selection; ties
    go to the lowest index.

    Source: Carbonell and Goldstein, "The use of MMR", SIGIR 1998.
    """
    rows = torch.arange(len(importance), device=importance.device)
    relevance = balance * importance
    redundancy = torch.full_like(importance, -math.inf)
    chosen = importance.argmax(dim=-1)  # (B,)
    order = [chosen]
    for _ in range(k - 1):
        redundancy = torch.maximum(redundancy, similarity[rows, chosen])
        # What was taken is as redundant as can be, whatever the balance.
        relevance = relevance.scatter(1, chosen.unsqueeze(-1), -math.inf)
        chosen = (relevance - (1 - balance) * redundancy).argmax(dim=-1)
        order.append(chosen)
    return torch.stack(order, dim=-1)


@dataclass(frozen=True, kw_only=True)
class MMR(AttentionRanked):
    """Maximal marginal relevance with the cosine of the projected tokens.

    IDPruner takes the importance from a trained scorer; here it is the encoder's attention, or the tokens' norm.

    Attributes
    ----------
    balance : float
        Weight of the importance, 0 to 1, against that of the diversity. The importance is scaled to [0, 1].
    importance : str
        As of every method that ranks by attention; or "norm", the Euclidean norm of the projected token, which needs
        nothing of the encoder.
    """

    source: ClassVar[str] = "IDPruner, arXiv 2602.13315"
    venue: ClassVar[str] = "arXiv"
    year: ClassVar[int] = 2026
    cost: ClassVar[str] = "one attention row of the encoder, O(N^2 D), greedy O(k N)"
    licence: ClassVar[str] = "Apache-2.0"

    importance: Literal["auto", "cls", "received", "norm"] = "auto"
    balance: float = 0.5

    def __post_init__(self):
        if not 0 <= self.balance <= 1:
            raise ValueError(f"MMR's balance must be a number from 0 to 1, not {self.balance}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.importance == "norm" else super().needs

    def attention(self, tokens: VisualTokens) -> torch.Tensor:
        if self.importance == "norm":
            return torch.linalg.vector_norm(tokens.features.float(), dim=-1)
        return super().attention(tokens)

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        importance = unit_interval(self.attention(tokens))
        return marginal_relevance_select(importance, cosine_similarity(tokens.features), tokens.k, self.balance)
