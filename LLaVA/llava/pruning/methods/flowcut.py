"""FlowCut: follow the flow of information through the encoder's layers, and drop in stages what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.methods.importance import AttentionRanked, Importance, most_important
from llava.pruning.tokens import VisualTokens


def shares(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Values (B, N) of the tokens that are present, as parts of their sum; 0 at the others."""
    values = values * present
    return values / values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


def drops_now(attention: torch.Tensor, count: torch.Tensor, k: int, to_come: int) -> torch.Tensor:
    """How many tokens leave at a stage, (B,): more where the attention is concentrated or few layers are to come.

    Of ``count`` (B,) tokens that are present, whose ``attention`` (B, N) adds up to 1; ``to_come`` are the layers after
    this one. After the last one all above k leave.
    """
    above = (count - k).clamp_min(0)
    if to_come == 0:
        return above
    entropy = -torch.special.xlogy(attention, attention).sum(dim=-1) / count.clamp_min(2).log()
    return (above / to_come**0.5 * (1 - entropy.square())).round().long().clamp_min(0).minimum(above)


def staged_flow(
    attention: torch.Tensor, content: torch.Tensor | None, values: torch.Tensor, k: int, every: int = 2
) -> torch.Tensor:
    """Tokens that stay through all stages: (B, k), int64.

    A layer's score of a token is its share of the attention, plus that of the similarity to [CLS] by content, times
    the L1 norm of its value. Half of it and half of what was cumulated before rank the tokens; every second layer the
    lowest leave.

    Parameters
    ----------
    attention : Tensor (B, N, E), float32
        What each layer pays a token; 0 at newlines, which leave before all others.
    content : Tensor (B, N, E), float32, or None
        How alike its value and that of [CLS] are.
    values : Tensor (B, N, E), float32
        L1 norm of its value.
    k, every : int
        1 <= k <= N; and layers from one stage to the next.

    Source: FlowCut, NeurIPS 2025.
    """
    layers = attention.shape[-1]
    patches = present = (attention > 0).any(dim=-1)
    count = present.sum(dim=-1)
    cumulated = torch.zeros_like(attention[..., 0])
    for layer in range(layers):
        paid = shares(attention[..., layer], present)
        flow = paid if content is None else paid + shares(content[..., layer], present)
        score = flow * values[..., layer]
        cumulated = score if layer == 0 else (cumulated + score) / 2
        to_come = layers - 1 - layer
        if to_come % every == 0:
            count = count - drops_now(paid, count, k, to_come)
            rank = most_important(cumulated.masked_fill(~present, -1)).argsort(dim=-1)
            present = present & (rank < count.unsqueeze(-1))
    # Of an image with fewer than k patches all stay, and newlines with them.
    last = (~present).int() + (~patches).int()
    return most_important(-last)[:, :k]


@dataclass(frozen=True, kw_only=True)
class FlowCut(AttentionRanked):
    """Importance cumulated over encoder layers, by attention, content and the strength of values, drops in stages.

    The published code drops the tokens from the encoder itself, whose later layers then see fewer. Here the encoder
    sees all of them, and only the candidates become fewer: the tokens that go on are those of an unpruned model.

    Attributes
    ----------
    layers : int
        How many of the encoder's layers before the last one that runs; all of CLIP ViT-L's are 22.
    """

    source: ClassVar[str] = "FlowCut, arXiv 2505.19536"
    venue: ClassVar[str] = "NeurIPS"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "one attention row and two products of each of E encoder layers, O(E N log N)"
    licence: ClassVar[str] = "Apache-2.0"

    importance: Importance = "auto"
    layers: int = 22

    def __post_init__(self):
        if self.layers < 1:
            raise ValueError(f"FlowCut's layers must be at least 1, not {self.layers}")

    @property
    def encoder_layers(self) -> tuple[int, ...]:
        return tuple(range(-1 - self.layers, -1))

    @property
    def needs(self) -> frozenset[str]:
        if self.importance == "received":
            return frozenset({"received_attention", "value_norms"})
        return frozenset({"layer_cls_attention", "value_norms", "cls_affinity"})

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        if self.importance == "received":
            return staged_flow(tokens.received_attention, None, tokens.value_norms, tokens.k)
        return staged_flow(tokens.layer_cls_attention, tokens.cls_affinity, tokens.value_norms, tokens.k)
