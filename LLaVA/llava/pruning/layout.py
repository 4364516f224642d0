"""How an image's visual tokens lie on the picture: the feature maps behind a flat sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch


@dataclass(frozen=True)
class FeatureMap:
    """A rectangle of patches, read row by row.

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

    def split(self) -> list[FeatureMap]:
        """The map of each crop, in the order in which `crops` counts them."""
        side = self.crop_side or max(self.rows, self.columns)
        heights, widths = _pieces(self.top, self.rows, side), _pieces(self.left, self.columns, side)
        maps = []
        for height in heights:
            for number, width in enumerate(widths, start=1):
                ends = self.newline == "row" and number == len(widths)
                maps.append(FeatureMap(height, width, "row" if ends else "none"))
        if self.newline == "end":
            maps[-1] = replace(maps[-1], newline="end")
        return maps


def _pieces(first: int, length: int, side: int) -> list[int]:
    """How ``length`` patches from ``first`` on are shared by crops of ``side`` patches."""
    edges = [first, *range((first // side + 1) * side, first + length, side), first + length]
    return [end - start for start, end in pairwise(edges)]


Layout = tuple[FeatureMap, ...]
"""An image's maps, one after the other; in LLaVA-1.6 the base view, then the crops as one map."""


def crop_numbers(layout: Layout) -> torch.Tensor:
    """The crop of every token of an image, counted through all of its maps: int64 (N,)."""
    numbers, first = [], 0
    for part in layout:
        crops = part.crops() + first
        first = int(crops.max()) + 1
        numbers.append(crops)
    return torch.cat(numbers)


def apportion(k: int, sizes: list[int]) -> list[int]:
    """Split a budget in proportion to sizes, in whole numbers that add up to ``k`` (largest remainders first).

    Parameters
    ----------
    k : int
        0 <= k <= sum(sizes).
    sizes : list of int

    Returns
    -------
    list of int
        No share is larger than its size.
    """
    total = sum(sizes)
    shares = [k * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(k * sizes[i] % total), i))
    for i in by_remainder[: k - sum(shares)]:
        shares[i] += 1
    return shares
