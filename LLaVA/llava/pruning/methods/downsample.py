"""Downsample: average-pool the image to the budget."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import Pruner
from llava.pruning.schedule import apportion
from llava.pruning.similarity import wide
from llava.pruning.tokens import KeptTokens, Layout, TokenGrid, VisualTokens


def cut(length: int, parts: int) -> torch.Tensor:
    """Which of ``parts`` nearly equal pieces each of ``length`` places belongs to: int64 (length,), ascending."""
    return ((torch.arange(length) + 1) * parts - 1) // length


def strips_of_cells(rows: int, columns: int, share: int, newline: str) -> tuple[list[int], int]:
    """Into how many strips a map is cut, and each strip into how many cells.

    The map's rows are cut into strips, which get cells in proportion to their height. Of all numbers of strips that
    spend the share exactly, with a cell in every strip and none narrower than a column, the one is taken whose mean
    cell, ``rows / strips`` high and ``columns * strips / cells`` wide, is closest to a square.

    Parameters
    ----------
    rows, columns : int
        Patches of the map.
    share : int
        Cells and newlines together, 1 <= share <= tokens of the map.
    newline : str
        As in `TokenGrid`. "row": every strip ends with a newline, the last one without where the share does not come
        out otherwise. "end": one newline, where the share is more than 1.

    Returns
    -------
    cells : list of int
        Of each strip, from the top.
    newlines : int
    """
    best, best_distortion = None, math.inf
    for missing in (0, 1):
        for strips in range(1, min(rows, share) + 1):
            newlines = {"none": 0, "row": strips - missing, "end": 1 - missing}[newline]
            total = share - newlines
            if total < strips:
                continue
            cells = apportion(total, cut(rows, strips).bincount().tolist())
            distortion = abs(math.log(rows * total / (columns * strips**2)))
            if min(cells) >= 1 and max(cells) <= columns and distortion < best_distortion:
                best, best_distortion = (cells, newlines), distortion
        if best is not None:
            break
    assert best is not None  # one strip always spends the share
    return best


def pooled_map(part: TokenGrid, share: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Partition a map into ``share`` cells and newlines, in raster order.

    Returns
    -------
    owner : Tensor (len(part),), int64
        The cell that each token goes into, -1 for newlines that are dropped.
    places : Tensor (share,), int64
        The patch nearest to each cell's centre; of a strip's newlines the one in the row of its centres.
    """
    if not part.columns:  # newlines alone: one column of them
        part = TokenGrid(part.rows, 1)
    cells, newlines = strips_of_cells(part.rows, part.columns, share, part.newline)
    strip_of_row = cut(part.rows, len(cells))
    ends = part.newline == "row"
    grid = torch.arange(part.rows * (part.columns + ends)).reshape(part.rows, -1)
    owner = torch.full((len(part),), -1)
    places, first = [], 0
    for strip, count in enumerate(cells):
        own = grid[strip_of_row == strip]
        centre = own[(len(own) - 1) // 2]
        cell = cut(part.columns, count)
        owner[own[:, : part.columns]] = first + cell
        width = cell.bincount()
        places.append(centre[width.cumsum(0) - width + (width - 1) // 2])
        first += count
        if ends and strip < newlines:
            owner[centre[-1]] = first
            places.append(centre[-1:])
            first += 1
    if part.newline == "end" and newlines:
        owner[-1] = first
        places.append(torch.tensor([len(part) - 1]))
    return owner, torch.cat(places)


@functools.lru_cache(maxsize=256)
def pooled_layout(layout: Layout, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`pooled_map` of a whole image, whose maps share the budget in proportion to their tokens.

    Returns
    -------
    owner : Tensor (N,), int64
    places : Tensor (k,), int64
        Ascending.
    """
    owners, places, cells, first = [], [], 0, 0
    for part, share in zip(layout, apportion(k, [len(part) for part in layout]), strict=True):
        if share == 0:
            owners.append(torch.full((len(part),), -1))
        else:
            owner, place = pooled_map(part, share)
            owners.append(torch.where(owner < 0, owner, owner + cells))
            places.append(place + first)
        cells, first = cells + share, first + len(part)
    return torch.cat(owners), torch.cat(places)


def cell_means(features: torch.Tensor, owner: torch.Tensor, k: int) -> torch.Tensor:
    """The mean of every cell's tokens: (B, N, D) -> (B, k, D), in the features' dtype.

    Parameters
    ----------
    features : Tensor (B, N, D), floating
    owner : Tensor (N,), int64
        The cell of each token, -1 for none; every cell has one token at least.
    k : int
        Number of cells.
    """
    x = wide(features)
    belongs = (owner == torch.arange(k, device=owner.device).unsqueeze(1)).to(x.dtype)  # (k, N)
    weights = belongs / belongs.sum(dim=1, keepdim=True)
    return (weights @ x).to(features.dtype)


def square_or_row(n: int) -> Layout:
    """The layout of ``n`` patches of which no more is known: a square where n is one, else a single row."""
    side = math.isqrt(n)
    return (TokenGrid(side, side) if side * side == n else TokenGrid(1, n),)


@dataclass(frozen=True, kw_only=True)
class Downsample(Pruner):
    """The mean of every cell, where each grid of the image is cut into cells of nearly equal area.

    Exactly k tokens go on, in raster order: strips of a map differ in their number of cells where a rectangle of cells
    does not meet the budget. Every pooled row keeps one newline where the map's rows have them.
    """

    source: ClassVar[str] = "average pooling of the patch grid"
    cost: ClassVar[str] = "O(N D)"

    def __post_init__(self):
        if self.drop_duplicates:
            raise ValueError("downsample averages whole maps: drop_duplicates would tear holes into them")

    def merge(self, tokens: VisualTokens) -> KeptTokens:
        batch, n, _ = tokens.features.shape
        owner, places = pooled_layout(tokens.layout or square_or_row(n), tokens.k)
        device = tokens.features.device
        pooled = cell_means(tokens.features, owner.to(device, non_blocking=True), tokens.k)
        return KeptTokens(pooled, places.to(device, non_blocking=True).repeat(batch, 1))
