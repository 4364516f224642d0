"""An image's visual tokens: where they lie, what a method sees of them, and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from llava.pruning.signals import SIGNALS, Signals


@dataclass(frozen=True)
class TokenGrid:
    """A rectangle of patches of an image, read row by row.

    Attributes
    ----------
    rows, columns : int
        Patches that are left of the map, rows >= 1. A map of no columns holds its newlines alone: of a very tall
        image the unpadding leaves no more.
    newline : str
        "none"; "row": an image-newline vector ends every row; "end": one ends the map.
    crop_side : int
        Patches along the side of a crop; 0 when the map is one crop.
    top, left : int
        Patch rows and columns of the crops' grid that were cut off as padding before this map.
    """

    rows: int
    columns: int
    newline: str = "none"
    crop_side: int = 0
    top: int = 0
    left: int = 0

    def __len__(self) -> int:
        ends = {"none": 0, "row": self.rows, "end": 1}[self.newline]
        return self.rows * self.columns + ends

    def crops(self) -> torch.Tensor:
        """Which of the map's crops each token belongs to, from 0, int64 (len,); a newline to the one before it."""
        side = self.crop_side or max(self.rows, self.columns)
        rows = (torch.arange(self.rows) + self.top) // side - self.top // side
        columns = torch.arange(self.columns + (self.newline == "row")).clamp(max=max(self.columns - 1, 0))
        columns = (columns + self.left) // side - self.left // side
        flat = (rows[:, None] * (columns[-1] + 1) + columns).flatten()
        return torch.cat([flat, flat[-1:]]) if self.newline == "end" else flat

    def is_newline(self) -> torch.Tensor:
        """Which tokens are image-newline vectors, bool (len,)."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        if self.newline == "row":
            mask[self.columns :: self.columns + 1] = True
        elif self.newline == "end":
            mask[-1] = True
        return mask

    def split(self) -> list[TokenGrid]:
        """The map of each crop, in the order in which `crops` counts them."""
        side = self.crop_side or max(self.rows, self.columns)
        heights, widths = _pieces(self.top, self.rows, side), _pieces(self.left, self.columns, side)
        maps = []
        for height in heights:
            for number, width in enumerate(widths, start=1):
                ends = self.newline == "row" and number == len(widths)
                maps.append(TokenGrid(height, width, "row" if ends else "none"))
        if self.newline == "end":
            maps[-1] = replace(maps[-1], newline="end")
        return maps


def _pieces(first: int, length: int, side: int) -> list[int]:
    """How ``length`` patches from ``first`` on are shared by crops of ``side`` patches."""
    edges = [first, *range((first // side + 1) * side, first + length, side), first + length]
    return [end - start for start, end in pairwise(edges)]


Layout = tuple[TokenGrid, ...]
"""An image's grids, one after the other; in LLaVA-1.6 the base view, then the crops as one grid."""


def crop_numbers(layout: Layout) -> torch.Tensor:
    """The crop of every token of an image, counted through all of its grids: int64 (N,)."""
    numbers, first = [], 0
    for part in layout:
        crops = part.crops() + first
        first = int(crops.max()) + 1
        numbers.append(crops)
    return torch.cat(numbers)


@dataclass(frozen=True)
class ImageTokens:
    """One image's visual tokens, as an unpruned model would see them.

    Attributes
    ----------
    features : Tensor (N, D)
    layout : tuple of TokenGrid, or None
        How they lie on the image; None where [CLS] is among them.
    signals : dict of name to value
        What the method asked for, by its name in `Signals`, without the axis of the images.
    """

    features: torch.Tensor
    layout: Layout | None = None
    signals: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class VisualTokens(Signals):
    """What a method sees: a batch of images with the same number of visual tokens, the budget, and `Signals`.

    Attributes
    ----------
    features : Tensor (B, N, D), floating
        Projected visual tokens, raster order; inside the decoder, hidden states.
    k : int
        Budget: number of tokens to keep of each image.
    layout : tuple of TokenGrid, or None
        How the N tokens lie on the image; None once some of them are gone.
    crops : Tensor (B, N), int64, or None
        Number of the crop that each token belongs to.
    whole : VisualTokens, or None
        With ``per_crop``, all tokens of the image that these are a crop of.
    """

    features: torch.Tensor
    k: int
    layout: Layout | None = None
    crops: torch.Tensor | None = None
    whole: VisualTokens | None = None

    @classmethod
    def of(
        cls,
        images: Sequence[ImageTokens],
        k: int,
        features: torch.Tensor | None = None,
        left: torch.Tensor | None = None,
        **seen: Any,
    ) -> VisualTokens:
        """A batch of images with the same number of tokens and the same signals.

        ``features`` (B, N, D) are their tokens now, by default as they were encoded; ``left`` (B, N) says which of each
        image's tokens these are, where some are gone; ``seen`` are further signals. The layout is handed on where all
        have the same.
        """
        if features is None:
            features = torch.stack([image.features for image in images])
        layouts = [image.layout for image in images]

        known = [layout for layout in layouts if layout is not None]

        def per_token(values: Sequence[torch.Tensor]) -> torch.Tensor:
            every = torch.stack(list(values)).to(features.device, non_blocking=True)
            return every if left is None else every[torch.arange(len(left), device=left.device)[:, None], left]

        def batch(name: str) -> Any:
            values = [image.signals[name] for image in images]
            if SIGNALS[name].per_token:
                return per_token(values)
            return tuple(one.to(features.device) if isinstance(one, torch.Tensor) else one for one in values)

        return cls(
            features,
            k,
            layout=layouts[0] if left is None and len(set(layouts)) == 1 else None,
            crops=per_token([crop_numbers(layout) for layout in known]) if len(known) == len(layouts) else None,
            **{name: batch(name) for name in images[0].signals},
            **seen,
        )

    def at(self, image: int, places: torch.Tensor, k: int, layout: Layout | None = None) -> VisualTokens:
        """The tokens at ``places`` (n,) of one image alone, with a budget and a layout of their own."""
        parts: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                parts[name] = value[image : image + 1, places]
            elif name in SIGNALS and value is not None:
                parts[name] = value[image : image + 1]
        return replace(self, **parts, k=k, layout=layout)


@dataclass(frozen=True)
class KeptTokens:
    """What a method leaves of a batch of images, or of one image (without the axis B).

    Attributes
    ----------
    features : Tensor (B, k, D)
        The tokens that go on, in this order, in the dtype of the input.
    indices : Tensor (B, k), int64
        Where they stood among the N; for a merged token, the place that stands for it. Distinct.
    """

    features: torch.Tensor
    indices: torch.Tensor

    @classmethod
    def all_of(cls, features: torch.Tensor) -> KeptTokens:
        """Everything of ``features`` (B, N, D) or (N, D), in order."""
        every = torch.arange(features.shape[-2], device=features.device)
        return cls(features, every.expand(features.shape[:-1]))


def gather_tokens(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The tokens (B, k, D) at ``indices`` (B, k) of ``features`` (B, N, D)."""
    return features.gather(1, indices.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
