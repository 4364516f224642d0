"""CDPruner: tokens that are diverse given the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llava.pruning.base import Pruner
from llava.pruning.similarity import cosine_kernel, greedy_map, text_similarity
from llava.pruning.tokens import VisualTokens


def min_max(scores: torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
    """Every image's scores (B, N) scaled to (0, 1], float32; all 1 where they do not differ.

    With ``among`` (B, M), of which they are some, to the range of those.
    """
    scores, among = scores.float(), (scores if among is None else among).float()
    lowest, highest = among.amin(dim=-1, keepdim=True), among.amax(dim=-1, keepdim=True)
    # The published 1e-6 leaves the least relevant token a gain above zero.
    return (scores - lowest + 1e-6) / (highest - lowest).clamp_min(1e-6)


def conditional_kernel(similarity: torch.Tensor, relevance: torch.Tensor) -> torch.Tensor:
    """``K_ij = r_i L_ij r_j``: (B, N, N), symmetric and positive semi-definite as L is.

    L are the cosines between tokens, and r (B, N), > 0, the relevance of each token to the question.
    Source: CDPruner, NeurIPS 2025, arXiv 2506.10967.
    """
    return (relevance.unsqueeze(2) * similarity).mul_(relevance.unsqueeze(1))


@dataclass(frozen=True, kw_only=True)
class CDPruner(Pruner):
    """Greedy maximisation of the determinant of a similarity kernel that is conditioned on the question.

    Attributes
    ----------
    relevance : str
        Where a token's relevance to the question comes from. "clip": *minus* the cosine between patch and question in
        CLIP's common space, as published: in that space CLIP's patches are the farther from a text, the more they show
        of it. It needs a vision tower that comes with its text tower. "embeddings": the mean cosine between the
        projected token and the question's embedded text tokens, for a tower that has none; its sign is not turned
        round, since the authors saw that only in CLIP.
    """

    source: ClassVar[str] = "CDPruner, arXiv 2506.10967"
    venue: ClassVar[str] = "NeurIPS"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "O(N^2 D), greedy O(k^2 N), and CLIP's text tower per question"
    licence: ClassVar[str] = "Apache-2.0"

    relevance: Literal["clip", "embeddings"] = "clip"

    def __post_init__(self):
        if self.relevance not in ("clip", "embeddings"):
            raise ValueError(f"CDPruner's relevance must be 'clip' or 'embeddings', not {self.relevance!r}")

    @property
    def needs(self) -> frozenset[str]:
        """The question, as the chosen relevance reads it."""
        return frozenset({"text_similarity" if self.relevance == "clip" else "question"})

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        # Crops of one image share a scale, as published: a crop that shows nothing of the question stays irrelevant.
        among = None if tokens.whole is None else self._relevance(tokens.whole)
        relevance = min_max(self._relevance(tokens), among)
        return greedy_map(conditional_kernel(cosine_kernel(tokens.features), relevance), tokens.k)

    def _relevance(self, tokens: VisualTokens) -> torch.Tensor:
        if self.relevance == "clip":
            return -tokens.text_similarity
        pairs = zip(tokens.features, tokens.question, strict=True)
        return torch.stack([text_similarity(features, question) for features, question in pairs])
