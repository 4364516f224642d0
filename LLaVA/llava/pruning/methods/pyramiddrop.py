"""PyramidDrop: drop in stages, the deeper the more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llava.pruning.schedule import Schedule
from llava.pruning.scheduled import ScheduledPruner
from llava.pruning.tokens import VisualTokens

PUBLISHED: Schedule = ((8, 0.5), (16, 0.25), (24, 0.125))
"""The paper's stages: lambda = 0.5 at a quarter, half and three quarters of 32 layers; 0.46875 on average."""


def rank(attention: torch.Tensor) -> torch.Tensor:
    """Tokens by the attention that the last prompt token pays them, averaged over the heads.

    Parameters
    ----------
    attention : Tensor (B, N, H), floating

    Returns
    -------
    Tensor (B, N), int64
        Most attended first; ties go to the lowest index.
    """
    return attention.float().mean(dim=-1).argsort(dim=-1, descending=True, stable=True)


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(ScheduledPruner):
    """At the input of several layers, the visual tokens that the last prompt token attends to most in that layer.

    The layer's own query and key projections are applied to its input for this one query, so the ranking needs nothing
    of the layer before, and a drop at layer 0 is possible.

    Attributes
    ----------
    schedule : str
        "published": half of the tokens from a quarter of the decoder on, a quarter from half, an eighth from three
        quarters, rounded down; a budget of its own. "scaled": the same, scaled to SUBSET_RATIO by
        `llava.pruning.schedule.scaled`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"next_attention"})
    source: ClassVar[str] = "PyramidDrop, arXiv 2410.17247"
    venue: ClassVar[str] = "CVPR"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "one attention row per drop, O(T D)"
    schedules: ClassVar[tuple[str, ...]] = ("published",)

    schedule: Literal["scaled", "published"] = "scaled"

    def published(self, name: str) -> Schedule:
        return PUBLISHED

    def kept_count(self, n: int, fraction: float) -> int:
        return max(1, int(n * fraction)) if self.schedule == "published" else super().kept_count(n, fraction)

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        return rank(tokens.next_attention)[:, : tokens.k]
