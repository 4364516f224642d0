"""DART: keep what repeats least of a few pivot tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import BEFORE, INSIDE, Pruner
from llava.pruning.similarity import products
from llava.pruning.tokens import VisualTokens, gather_tokens


def least_like_pivots(similarity: torch.Tensor, pivots: torch.Tensor, k: int) -> torch.Tensor:
    """Pivots that are visual tokens, and then, pivot by pivot, the tokens that are least similar to it.

    Parameters
    ----------
    similarity : Tensor (B, P, N), floating
        Of every pivot to every token; the visual pivots come first, and text may follow.
    pivots : Tensor (B, p), int64
        Which tokens the visual pivots are, p <= P.
    k : int
        1 <= k <= N. The pivots share what is left of it beside themselves equally; the first ones take one more.

    Returns
    -------
    Tensor (B, k), int64
        In the order of selection; ties go to the lowest index.

    Source: DART, EMNLP 2025.
    """
    batch, count, n = similarity.shape
    taken = torch.zeros(batch, n, dtype=torch.bool, device=similarity.device)
    order = [pivots[:, :k]]
    taken.scatter_(1, order[0], True)
    share, more = divmod(k - order[0].shape[1], count)
    for pivot in range(count):
        left = similarity[:, pivot].masked_fill(taken, math.inf)
        order.append(left.argsort(dim=-1, stable=True)[:, : share + (pivot < more)])
        taken.scatter_(1, order[-1], True)
    return torch.cat(order, dim=1)


def largest(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` of N vectors (..., N, C) with the largest L1 norm: int64 (..., count or N), the largest first."""
    return vectors.float().abs().sum(dim=-1).argsort(dim=-1, descending=True, stable=True)[..., :count]


@dataclass(frozen=True, kw_only=True)
class DART(Pruner):
    """Pivots are the tokens of the largest L1 norm; each in turn keeps the visual tokens least similar to it.

    At the input of decoder layer K, the norm is that of the keys in layer K - 1, pivots are chosen among the image's
    tokens and, apart, among the text after it, and the cosines are those of the hidden states at layer K after the
    decoder's final norm. Keys carry their rotary embedding, and so the L1 norm a trace of their position: where padding
    counts as positions, as in the forward pass of transformers' models without position_ids, it may change a choice.

    Attributes
    ----------
    visual_pivots : int
        At least 1. They are kept.
    text_pivots : int
        At least 0; fewer where the text is shorter.
    embeddings : bool
        Work before the decoder: the norm and the cosines are those of the visual tokens, and there are no text pivots.
    """

    source: ClassVar[str] = "DART, arXiv 2502.11494, K = 2"
    venue: ClassVar[str] = "EMNLP"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "one layer's keys, O(p N D) for p pivots"
    licence: ClassVar[str] = "Apache-2.0"

    visual_pivots: int = 4
    text_pivots: int = 4
    embeddings: bool = False

    def __post_init__(self):
        if self.visual_pivots < 1:
            raise ValueError(f"DART's visual_pivots must be at least 1, not {self.visual_pivots}")
        if self.text_pivots < 0:
            raise ValueError(f"DART's text_pivots must be at least 0, not {self.text_pivots}")

    @property
    def where(self) -> str:
        return BEFORE if self.embeddings else INSIDE

    @property
    def first_layer(self) -> int:
        return 0 if self.embeddings else 1

    @property
    def default_layer(self) -> int:
        return 0 if self.embeddings else 2

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.embeddings else frozenset({"keys", "text_keys", "states", "text_states"})

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        x = (tokens.features if self.embeddings else tokens.states).float()
        unit = torch.nn.functional.normalize(x, dim=-1)
        pivots = largest(x if self.embeddings else tokens.keys, self.visual_pivots)  # (B, p)
        own = gather_tokens(unit, pivots)
        if self.embeddings:
            return least_like_pivots(products(own, unit), pivots, tokens.k)
        chosen = []  # images differ in how many text pivots there are
        for image, (keys, states) in enumerate(zip(tokens.text_keys, tokens.text_states, strict=True)):
            text = torch.nn.functional.normalize(states[largest(keys, self.text_pivots)].float(), dim=-1)
            similarity = products(torch.cat([own[image], text]), unit[image])
            chosen.append(least_like_pivots(similarity[None], pivots[image : image + 1], tokens.k))
        return torch.cat(chosen)
