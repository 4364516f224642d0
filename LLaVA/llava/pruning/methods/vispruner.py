"""VisPruner: half of the budget for the patches that [CLS] attends to, half for patches unlike one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.methods.importance import AttentionRanked, Importance, most_important
from llava.pruning.methods.visionzip import patch_counts
from llava.pruning.similarity import cosine_similarity
from llava.pruning.tokens import VisualTokens

REMOVED_PER_ROUND = 8


def remove_duplicates(similarity: torch.Tensor, ranked: torch.Tensor, count: int) -> torch.Tensor:
    """Drop the most redundant of an image's tokens, a few a round, until ``count`` are left: (count,), int64.

    Each round deals the list into its even and its odd places and drops up to eight of the even ones, those with the
    most similar odd one. The even ones that stay then lead the list, the most similar first, and the odd ones follow.
    A list of odd length has one more even place than odd ones. Of equally redundant ones the earlier in the list goes
    first, as in the published code.

    Parameters
    ----------
    similarity : Tensor (N, N), floating
    ranked : Tensor (R,), int64
        The list: distinct tokens, the most important first.
    count : int
        1 <= count <= R.

    Source: VisPruner, ICCV 2025.
    """
    left = ranked
    while len(left) > count:
        even, odd = left[::2], left[1::2]
        # Twice index_select: several times as fast on a CPU as one indexing with rows and columns.
        redundancy = similarity.index_select(0, even).index_select(1, odd).amax(dim=-1)
        removed = min(REMOVED_PER_ROUND, len(left) - count)
        stay = redundancy.argsort(descending=True, stable=True)[removed:]
        left = torch.cat([even[stay], odd])
    return left


@dataclass(frozen=True, kw_only=True)
class VisPruner(AttentionRanked):
    """Important tokens by the encoder's attention; the rest of the budget, diverse tokens by the encoder's features.

    Newline tokens have no encoder feature to be alike by, so they go on only where the budget exceeds the patches.

    Attributes
    ----------
    important_ratio : float
        Part of the budget, 0 to 1, that goes to important tokens (rounded down).
    """

    source: ClassVar[str] = "VisPruner, arXiv 2412.01818"
    venue: ClassVar[str] = "ICCV"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "one attention row of the encoder, O(N^2 C)"
    licence: ClassVar[str] = "Apache-2.0"

    importance: Importance = "auto"
    important_ratio: float = 0.5

    def __post_init__(self):
        if not 0 <= self.important_ratio <= 1:
            raise ValueError(f"VisPruner's important_ratio must be a number from 0 to 1, not {self.important_ratio}")

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"encoder_features"}

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        attention = self.attention(tokens)
        order = most_important(attention)
        important = int(tokens.k * self.important_ratio)
        if important == tokens.k:
            return order[:, :important]
        similarity = cosine_similarity(tokens.encoder_features)
        diverse = [
            remove_duplicates(alike, ranked[important : max(patches, tokens.k)], tokens.k - important)
            for alike, ranked, patches in zip(similarity, order, patch_counts(attention), strict=True)
        ]
        return torch.cat([order[:, :important], torch.stack(diverse)], dim=1)
