"""Random: a uniform subset, the baseline that many published methods lose to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import Pruner
from llava.pruning.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """k tokens drawn without replacement, each subset with the same chance.

    The draw depends on ``seed`` and on the image's content only, not on the batch, the rank or the order of the
    images.

    Attributes
    ----------
    seed : int
        Different seeds draw independently.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"image_keys"})
    source: ClassVar[str] = "uniform k-subset without replacement"
    cost: ClassVar[str] = "none"

    seed: int = 0

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        drawn = [self._draw(key, tokens.features.shape[1], tokens.k) for key in tokens.image_keys]
        return torch.stack(drawn).to(tokens.features.device, non_blocking=True)

    def _draw(self, image_key: int, n: int, k: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{image_key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randperm(n, generator=generator)[:k]
