"""How important the vision encoder finds each patch: what several methods rank by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from llava.pruning.base import Pruner
from llava.pruning.tokens import VisualTokens

Importance = Literal["auto", "cls", "received"]


@dataclass(frozen=True, kw_only=True)
class AttentionRanked(Pruner):
    """A method that reads a patch's importance off the attention in the last layer of the vision encoder that runs.

    Attributes
    ----------
    importance : str
        "cls": the attention that [CLS] pays a patch, averaged over the heads. "received": what all queries pay it,
        averaged over queries and heads, for encoders without [CLS]. "auto": the first where there is a [CLS]. A method
        states which it takes (`Importance`), and may add others, which need nothing of the encoder.
    """

    importance: str = "auto"

    @property
    def encoder_layers(self) -> tuple[int, ...]:
        """The last one that runs."""
        return (-1,)

    @property
    def needs(self) -> frozenset[str]:
        names = {"auto": "cls_attention", "cls": "cls_attention", "received": "received_attention"}
        return frozenset({names[self.importance]} if self.importance in names else ())

    def for_encoder(self, has_cls: bool) -> AttentionRanked:
        if self.importance != "auto":
            return self
        return dataclasses.replace(self, importance="cls" if has_cls else "received")

    def attention(self, tokens: VisualTokens) -> torch.Tensor:
        """Importance of every token: (B, N), float32, >= 0; 0 at newlines, which no encoder ever saw."""
        if self.importance == "received":
            return tokens.received_attention[..., -1].float()
        return tokens.cls_attention.float().mean(dim=-1)


def most_important(attention: torch.Tensor) -> torch.Tensor:
    """Tokens by importance (B, N), the largest first; ties go to the lowest index."""
    return attention.argsort(dim=-1, descending=True, stable=True)


def unit_interval(values: torch.Tensor) -> torch.Tensor:
    """Each image's values (B, N) moved and scaled to [0, 1]; 0 where all are equal."""
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    span = high - low
    return (values - low) / torch.where(span > 0, span, 1)
