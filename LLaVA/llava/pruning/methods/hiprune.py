"""HiPrune: anchors on the objects, the buffers around them, and registers for the image as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import Pruner
from llava.pruning.tokens import Layout, VisualTokens


def grid_neighbours(places: torch.Tensor, compat: bool = False) -> torch.Tensor:
    """The tokens left, right, above and below of every token of a grid: (rows * columns, 4), int64.

    ``places`` (rows, columns) says where each patch stands among the tokens; a token itself stands for a neighbour that
    is not there. With ``compat`` the published neighbourhood, which counts along the raster: the end of a row is beside
    the start of the next, and whoever is outside the grid is replaced by its first or its last token.
    """
    rows, columns = places.shape
    if compat:
        steps = torch.tensor([-1, 1, -columns, columns])
        beside = torch.arange(rows * columns).unsqueeze(1) + steps
        return places.flatten()[beside.clamp(0, rows * columns - 1)]
    left = torch.cat([places[:, :1], places[:, :-1]], dim=1)
    right = torch.cat([places[:, 1:], places[:, -1:]], dim=1)
    above = torch.cat([places[:1], places[:-1]])
    below = torch.cat([places[1:], places[-1:]])
    return torch.stack([left, right, above, below], dim=-1).flatten(0, 1)


def neighbours(layout: Layout | None, n: int, compat: bool = False) -> torch.Tensor:
    """`grid_neighbours` of all ``n`` tokens of an image: int64 (n, 4).

    Each map of the layout is a grid of its own, and a newline has no neighbours and is none. Without a layout (a crop
    alone, or inside the decoder) the tokens are a square grid, or a single row where ``n`` is not a square.
    """
    if layout is None:
        side = math.isqrt(n)
        shape = (side, side) if side * side == n else (1, n)
        return grid_neighbours(torch.arange(n).reshape(shape), compat)
    table = torch.arange(n).unsqueeze(1).repeat(1, 4)
    first = 0
    for part in layout:
        patches = first + (~part.is_newline()).nonzero().flatten()
        table[patches] = grid_neighbours(patches.reshape(part.rows, part.columns), compat)
        first += len(part)
    return table


def anchors_buffers_registers(
    object_attention: torch.Tensor,
    deep_attention: torch.Tensor,
    beside: torch.Tensor,
    anchors: int,
    k: int,
) -> torch.Tensor:
    """Anchors first, then their buffers while there is room, then registers up to exactly ``k``: (B, k), int64.

    Anchors and buffers are by the object layer's attention, registers by the deep layer's; ties go to the lowest index.

    Parameters
    ----------
    object_attention, deep_attention : Tensor (B, N), floating, >= 0
        Attention that each token receives in the object layer and in the deep layer. Tokens without any are newlines,
        which come after all patches.
    beside : Tensor (N, 4), int64
        The neighbours of each token.
    anchors, k : int
        0 <= anchors <= k <= N.

    Source: HiPrune, arXiv 2508.00553.
    """
    by_object = object_attention.argsort(dim=-1, descending=True, stable=True)
    anchor = by_object[:, :anchors]
    buffer = beside.to(anchor.device, non_blocking=True)[anchor].flatten(1)
    rank = torch.zeros_like(by_object)
    rank.scatter_(1, buffer, 1)
    rank.scatter_(1, anchor, 2)
    rank.masked_fill_((object_attention == 0) & (deep_attention == 0), -1)
    attention = torch.where(rank > 0, object_attention, deep_attention)
    order = attention.argsort(dim=-1, descending=True, stable=True)
    by_rank = rank.gather(1, order).argsort(dim=-1, descending=True, stable=True)
    return order.gather(1, by_rank)[:, :k]


@dataclass(frozen=True, kw_only=True)
class HiPrune(Pruner):
    """Middle layers of the encoder look at objects, deep ones at the whole image: tokens of both kinds.

    Anchors are the patches with the most attention in the object layer, their buffers the patches left, right, above
    and below; registers have the most attention in the deepest layer that runs. A fifth of the part ``alpha`` is
    anchors, since each may bring four buffers. Where anchors and buffers exceed the budget, the buffers with the
    least attention are left out.

    Attributes
    ----------
    alpha : float
        Part of the budget, 0 to 1, meant for anchors and buffers.
    object_layer : int
        Encoder layer of the anchors, counted from 1.
    compat : bool
        The neighbourhood of the published code, where a row's end is beside the next row's start and patches at the
        border have the image's first or last token as a neighbour.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"received_attention"})
    source: ClassVar[str] = "HiPrune, arXiv 2508.00553"
    venue: ClassVar[str] = "arXiv"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "two attention maps of the encoder, O(N^2 C)"
    licence: ClassVar[str] = "MIT"

    alpha: float = 0.1
    object_layer: int = 9
    compat: bool = False

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"HiPrune's alpha must be a number from 0 to 1, not {self.alpha}")
        if self.object_layer < 1:
            raise ValueError(
                f"HiPrune's object_layer must be a layer of the encoder, counted from 1, not {self.object_layer}"
            )

    @property
    def encoder_layers(self) -> tuple[int, ...]:
        """The object layer and the deepest one that runs."""
        return (self.object_layer - 1, -1)

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        n = tokens.features.shape[1]
        object_attention, deep_attention = tokens.received_attention.unbind(dim=-1)
        return anchors_buffers_registers(
            object_attention,
            deep_attention,
            beside=neighbours(tokens.layout, n, self.compat),
            anchors=round(self.alpha * tokens.k / 5),
            k=tokens.k,
        )
