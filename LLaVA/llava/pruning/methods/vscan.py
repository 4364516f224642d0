"""VScan: half of the tokens by a global look, half by a look into every window, and the rest merged into them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import Pruner
from llava.pruning.methods.fastv import FastV
from llava.pruning.methods.groups import select_by_quota
from llava.pruning.methods.importance import AttentionRanked, Importance, most_important
from llava.pruning.schedule import Schedule
from llava.pruning.similarity import products, wide
from llava.pruning.tokens import KeptTokens, Layout, VisualTokens, gather_tokens


def windows_of(layout: Layout | None, n: int, side: int) -> tuple[torch.Tensor, int]:
    """The window of each of ``n`` tokens, int64 (n,), and how many windows there are.

    Every grid of the layout is cut into ``side`` by ``side`` windows, or fewer where it has fewer rows or columns; a
    newline belongs to the last window of its row. Without a layout the tokens are a square, or a single row.
    """
    if layout is None:
        root = math.isqrt(n)
        shapes = [(root, root, "none") if root * root == n else (1, n, "none")]
    else:
        shapes = [(grid.rows, grid.columns, grid.newline) for grid in layout]
    parts, first = [], 0
    for rows, columns, newline in shapes:
        down, across = min(side, rows), min(side, max(columns, 1))
        row = torch.arange(rows) * down // rows
        column = (torch.arange(columns + (newline == "row")) * across // max(columns, 1)).clamp_max(across - 1)
        own = (first + row[:, None] * across + column).flatten()
        parts += [own, own[-1:]] if newline == "end" else [own]
        first += down * across
    return torch.cat(parts), first


def merge_into_nearest(features: torch.Tensor, kept: torch.Tensor, mergeable: torch.Tensor) -> torch.Tensor:
    """Kept tokens, each averaged with those of the rest that are most similar to it.

    Parameters
    ----------
    features : Tensor (B, N, D), floating
    kept : Tensor (B, k), int64
    mergeable : Tensor (B, N), bool
        Of the rest, who is merged at all.

    Returns
    -------
    Tensor (B, k, D), in the dtype of ``features``
    """
    x = wide(features)
    with torch.no_grad():
        unit = torch.nn.functional.normalize(x, dim=-1)
        nearest = products(unit, gather_tokens(unit, kept)).argmax(dim=-1)  # (B, N)
        joins = nearest.unsqueeze(-1) == torch.arange(kept.shape[1], device=kept.device)  # (B, N, k)
        joins &= mergeable.scatter(1, kept, False).unsqueeze(-1)
    sums = joins.mT.to(x.dtype) @ x + gather_tokens(x, kept)
    return (sums / (1 + joins.sum(dim=1)).unsqueeze(-1)).to(features.dtype)


@dataclass(frozen=True, kw_only=True)
class VScan(AttentionRanked):
    """A global scan by the last layer's attention, a local one by a shallow layer's, and token merging.

    Of the budget, half (rounded up) is global: the largest attention in the encoder's last layer that runs. The other
    half is shared equally by the windows of a grid, each of which gives its tokens of the largest attention in a
    shallow layer. All other patches are averaged into the kept token that they are most similar to. In the middle of
    the decoder a second drop may follow, by the last prompt token's attention in the layer before; the kept ratio is
    then the mean over the decoder's layers.

    Attributes
    ----------
    local_layer : int
        Encoder layer of the local scan, counted from 1.
    windows : int
        Windows along a side of the image, at least 1.
    second_ratio : float or None
        The share of what entered the decoder that the second drop leaves, 0 < r <= 1; a third as published. None: there
        is no second drop.
    """

    source: ClassVar[str] = "VScan, arXiv 2505.22654"
    venue: ClassVar[str] = "TMLR"
    year: ClassVar[int] = 2026
    cost: ClassVar[str] = "two attention rows of the encoder, merging O(k N D)"
    licence: ClassVar[str] = "MIT"

    importance: Importance = "auto"
    local_layer: int = 6
    windows: int = 4
    second_ratio: float | None = None

    def __post_init__(self):
        if self.second_ratio is not None and not 0 < self.second_ratio <= 1:
            raise ValueError(f"VScan's second_ratio must be a number with 0 < r <= 1, not {self.second_ratio:g}")
        for name in ("local_layer", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"VScan's {name} must be at least 1, not {getattr(self, name)}")

    @property
    def encoder_layers(self) -> tuple[int, ...]:
        """The shallow layer and the deepest one that runs."""
        return (self.local_layer - 1, -1)

    @property
    def default_layer(self) -> int | None:
        return 0 if self.second_ratio is None else None

    @property
    def later(self) -> Pruner | None:
        return None if self.second_ratio is None else FastV(position_ids=self.position_ids, per_crop=self.per_crop)

    def check_budget(self, ratio: float | None, layer: int | None) -> None:
        super().check_budget(ratio, layer)
        if self.second_ratio is not None and layer is not None:
            raise ValueError(
                f"LAYER_INDEX={layer} must be left out with VSCAN_SECOND_RATIO={self.second_ratio:g}: the method drops "
                "before the decoder and in its middle"
            )

    def schedule_for(self, ratio: float | None, layer: int | None, num_layers: int) -> Schedule:
        middle = num_layers // 2
        if self.second_ratio is None or middle == 0:
            return super().schedule_for(ratio, layer or 0, num_layers)
        assert ratio is not None  # check_budget's
        deep = num_layers - middle
        first = ratio * num_layers / (middle + deep * self.second_ratio)
        if first < 1:
            return ((0, first), (middle, first * self.second_ratio))
        # All tokens enter the decoder: the second drop leaves more, so that the mean is met.
        return ((0, 1.0), (middle, (ratio * num_layers - middle) / deep))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"received_attention" if self.importance == "received" else "layer_cls_attention"})

    def choose(self, tokens: VisualTokens) -> torch.Tensor:
        """The tokens that stay: (B, k), int64, ascending."""
        both = tokens.received_attention if self.importance == "received" else tokens.layer_cls_attention
        local, whole = both.unbind(dim=-1)
        looks = tokens.k - tokens.k // 2
        first = most_important(whole)[:, :looks]
        window, count = windows_of(tokens.layout, local.shape[1], self.windows)
        window = window.to(local.device, non_blocking=True).expand(len(local), -1)
        ranked = local.scatter(1, first, -1)
        best = ranked.new_full((len(local), count), -1).scatter_reduce(1, window, ranked, "amax")
        quota = torch.full_like(best, tokens.k // 2 // count, dtype=torch.int64)
        # Newlines come after all patches, and what was chosen already after everything.
        second = select_by_quota(most_important(ranked), window, quota, best, tokens.k // 2, ranked <= 0)
        return torch.cat([first, second], dim=1).sort(dim=-1).values

    def merge(self, tokens: VisualTokens) -> KeptTokens:
        with torch.no_grad():
            kept = self.choose(tokens)
        both = tokens.received_attention if self.importance == "received" else tokens.layer_cls_attention
        patches = (both > 0).any(dim=-1)
        return KeptTokens(merge_into_nearest(tokens.features, kept, patches), kept)
