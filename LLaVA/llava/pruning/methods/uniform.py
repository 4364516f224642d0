"""Uniform: evenly spaced tokens of the flattened raster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import Pruner
from llava.pruning.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Uniform(Pruner):
    """Token ``floor((i + 1/2) N / k)`` for i = 0 .. k - 1."""

    source: ClassVar[str] = "evenly spaced over the raster sequence"
    cost: ClassVar[str] = "none"

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        batch, n, _ = tokens.features.shape
        steps = torch.arange(tokens.k, device=tokens.features.device)
        return ((2 * steps + 1) * n // (2 * tokens.k)).repeat(batch, 1)
