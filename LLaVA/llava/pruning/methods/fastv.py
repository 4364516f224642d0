"""FastV: keep what the last prompt token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import INSIDE, Pruner
from llava.pruning.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FastV(Pruner):
    """At the input of decoder layer K, the visual tokens with the most attention in layer K - 1.

    A token's score is the attention that the last prompt token pays it, averaged over the heads. Each row of a batch
    ranks its own tokens, and the last token is the last one that is not padding.
    """

    where: ClassVar[str] = INSIDE
    needs: ClassVar[frozenset[str]] = frozenset({"last_attention"})
    source: ClassVar[str] = "FastV, arXiv 2403.06764, K = 2"
    venue: ClassVar[str] = "ECCV"
    year: ClassVar[int] = 2024
    cost: ClassVar[str] = "one attention row, O(T D)"
    first_layer: ClassVar[int] = 1
    default_layer: ClassVar[int] = 2

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        scores = tokens.last_attention.mean(dim=-1)  # (B, N)
        return scores.argsort(dim=-1, descending=True, stable=True)[:, : tokens.k]
