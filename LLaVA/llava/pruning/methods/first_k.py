"""First-K: the top rows of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import Pruner
from llava.pruning.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FirstK(Pruner):
    """Tokens 0 .. k - 1 of the raster."""

    source: ClassVar[str] = "OTPrune (arXiv 2602.20205), figure 2"
    cost: ClassVar[str] = "none"

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        return torch.arange(tokens.k, device=tokens.features.device).repeat(tokens.features.shape[0], 1)
