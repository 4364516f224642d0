"""Last-K: the bottom rows of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import Pruner
from llava.pruning.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class LastK(Pruner):
    """Tokens N - k .. N - 1 of the raster."""

    source: ClassVar[str] = "OTPrune (arXiv 2602.20205), figure 2"
    cost: ClassVar[str] = "none"

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        batch, n, _ = tokens.features.shape
        return torch.arange(n - tokens.k, n, device=tokens.features.device).repeat(batch, 1)
