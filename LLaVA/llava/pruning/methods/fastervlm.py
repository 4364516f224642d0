"""FasterVLM: keep the patches that [CLS] attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.methods.importance import AttentionRanked, Importance, most_important
from llava.pruning.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FasterVLM(AttentionRanked):
    """The k patches of the largest importance. Newline tokens go on only where the budget exceeds the patches."""

    source: ClassVar[str] = "FasterVLM, arXiv 2412.01818v1"
    venue: ClassVar[str] = "arXiv"
    year: ClassVar[int] = 2024
    cost: ClassVar[str] = "one attention row of the encoder"
    licence: ClassVar[str] = "Apache-2.0"

    importance: Importance = "auto"

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        return most_important(self.attention(tokens))[:, : tokens.k]
