"""SCOPE: cover all tokens, and prefer salient ones to cover them with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.methods.coverage import facility_select
from llava.pruning.methods.importance import AttentionRanked, Importance
from llava.pruning.similarity import cosine_similarity
from llava.pruning.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class SCOPE(AttentionRanked):
    """Greedy coverage in which a token's gain is weighted by its saliency.

    With ``m_i`` the largest cosine of token i to what is kept (0 at first), the next token maximises
    ``a_j^alpha sum_i max(0, cos_ij - m_i)``. Cosines are those of the encoder's features. Newline tokens have neither
    features nor saliency there, and go on only where the budget exceeds the patches.

    Attributes
    ----------
    alpha : float
        How much saliency counts against coverage, >= 0; 0 is coverage alone.
    """

    source: ClassVar[str] = "SCOPE, arXiv 2510.24214"
    venue: ClassVar[str] = "NeurIPS"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "one attention row of the encoder, O(N^2 C), greedy O(k N^2) at most"
    licence: ClassVar[str] = "published code without one"

    importance: Importance = "auto"
    alpha: float = 1.0

    def __post_init__(self):
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"SCOPE's alpha must be a finite number >= 0, not {self.alpha}")

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"encoder_features"}

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        similarity = cosine_similarity(tokens.encoder_features)
        return facility_select(similarity, tokens.k, weight=self.attention(tokens) ** self.alpha)
