"""The pictures that an image's visual tokens cover, and which token lies where on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image

from llava.eval.places import Box, Tile
from llava.images import REDUCING_GAP
from llava.pruning.tokens import Layout, TokenGrid

NOTHING = -1
"""In a view's patches: no token lies there."""
PADDING = (122, 116, 104)
"""The colour of what lies beyond an image's edges: LLaVA's."""
LONGEST = 1344
"""Pixels that an image is shrunk to before it is cut into pictures."""


@dataclass(frozen=True)
class View:
    """One picture that a run of visual tokens covers.

    Attributes
    ----------
    name : str
        "image", "base view" or "crops".
    picture : PIL.Image
        RGB, what the patches lie on.
    patches : ndarray (rows, columns), int
        Index of the visual token at each patch, or `NOTHING`.
    """

    name: str
    picture: Image.Image
    patches: np.ndarray

    @property
    def scale(self) -> int:
        """Pixels that a patch is drawn with."""
        return max(1, round(480 / max(self.patches.shape)))

    def pixels(self) -> np.ndarray:
        """The picture as it is drawn: (rows * scale, columns * scale, 3), float32."""
        rows, columns = self.patches.shape
        return np.asarray(self.picture.resize((columns * self.scale, rows * self.scale)), dtype=np.float32)

    def enlarged(self, values: np.ndarray) -> np.ndarray:
        """What stands at each patch, (rows, columns) or (rows, columns, C), as large as `pixels`: (H, W, C or 1)."""
        values = values[..., None] if values.ndim == 2 else values
        return values.repeat(self.scale, 0).repeat(self.scale, 1)


@dataclass(frozen=True)
class Part:
    """A grid of an image's tokens on the image.

    Attributes
    ----------
    patches : ndarray (rows, columns), int
        Index of the visual token at each patch.
    box : Box
        What of the image they cover.
    """

    patches: np.ndarray
    box: Box

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels of the image."""
        left, top, right, bottom = self.box
        return right - left, bottom - top


def parts_of(layout: Layout, tiles: Sequence[Tile | None], size: tuple[int, int], first: int = 0) -> list[Part]:
    """Where the grids of a layout lie on an image.

    Parameters
    ----------
    layout : tuple of TokenGrid
        One for each tile, or one for the first and one for all others together.
    tiles : sequence of Tile or None
    size : (width, height)
        Of the image.
    first : int
        Index of the first token.
    """
    parts = []
    for number, grid in enumerate(layout):
        alone = number == 0 or len(layout) == len(tiles)
        box = (tiles[number] and tiles[number].box) if alone else _box_of_crops(grid, tiles[1:], size)
        if box and grid.columns:
            ends = grid.columns + (grid.newline == "row")
            patches = first + np.arange(grid.rows * ends).reshape(grid.rows, ends)
            parts.append(Part(patches[:, : grid.columns], box))
        first += len(grid)
    return parts


def _box_of_crops(grid: TokenGrid, tiles: Sequence[Tile | None], size: tuple[int, int]) -> Box:
    """What a map of several tiles covers, by the tile that shows most of the image."""
    shown = [(tile.content, number, tile) for number, tile in enumerate(tiles) if tile is not None]
    if not grid.crop_side or not shown:  # shrunk to fit, or next to nothing: the whole image
        return 0.0, 0.0, float(size[0]), float(size[1])
    _, number, tile = max(shown, key=lambda each: each[0])
    row, column = divmod(number, ceil((2 * grid.left + grid.columns) / grid.crop_side))
    left, top, right, bottom = tile.box
    across, down = (right - left) / grid.crop_side, (bottom - top) / grid.crop_side  # of a patch
    left += (grid.left - column * grid.crop_side) * across
    top += (grid.top - row * grid.crop_side) * down
    return left, top, left + grid.columns * across, top + grid.rows * down


def pictures_of(image: Image.Image, parts: Sequence[Part]) -> list[View]:
    """What the parts of an image cover, tiles of the same size as one picture.

    Parameters
    ----------
    image : PIL.Image
        RGB.
    parts : sequence of Part
    """
    groups: list[list[Part]] = []
    for part in parts:
        beside = next((group for group in groups if all(_lie_side_by_side(part, other) for other in group)), None)
        if beside is None:
            groups.append([part])
        else:
            beside.append(part)
    joined = [_joined(group) for group in groups]
    # The whole image has the largest patches.
    areas = [part.size[0] * part.size[1] / part.patches.size for part in joined]
    names = ["base view" if area == max(areas) else "crops" for area in areas]
    return [
        View("image" if len(joined) == 1 else name, _cut(image, part.box, part.patches.shape), part.patches)
        for name, part in zip(names, joined, strict=True)
    ]


def _lie_side_by_side(one: Part, other: Part) -> bool:
    """Whether two parts are of the same size, and not of the same place."""
    apart = np.abs(np.subtract(one.box[:2], other.box[:2])) > 0.5 * np.array(one.size)
    return one.patches.shape == other.patches.shape and np.allclose(one.size, other.size, rtol=0.05) and apart.any()


def _joined(parts: Sequence[Part]) -> Part:
    """Parts of the same size, side by side and one below the other, as one."""
    width, height = np.mean([part.size for part in parts], axis=0)
    left, top = (min(part.box[axis] for part in parts) for axis in (0, 1))
    places = [(round((part.box[1] - top) / height), round((part.box[0] - left) / width)) for part in parts]
    down, across = (1 + max(place[axis] for place in places) for axis in (0, 1))
    rows, columns = parts[0].patches.shape
    patches = np.full((down * rows, across * columns), NOTHING)
    for part, (row, column) in zip(parts, places, strict=True):
        patches[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns] = part.patches
    return Part(patches, (left, top, left + across * width, top + down * height))


def _cut(image: Image.Image, box: Box, shape: tuple[int, int]) -> Image.Image:
    """A box of an image, and `PADDING` beyond its edges, with the same whole number of pixels for each patch."""
    shrink = min(1.0, LONGEST / max(image.size))
    if shrink < 1:
        small = tuple(max(1, round(shrink * side)) for side in image.size)
        across, down = small[0] / image.width, small[1] / image.height
        image = image.resize(small, reducing_gap=REDUCING_GAP)
        box = box[0] * across, box[1] * down, box[2] * across, box[3] * down
    margins = [
        max(0, ceil(beyond - 0.01)) for beyond in (-box[0], -box[1], box[2] - image.width, box[3] - image.height)
    ]
    left, top, right, bottom = margins
    canvas = Image.new("RGB", (left + image.width + right, top + image.height + bottom), PADDING)
    canvas.paste(image, (left, top))
    scale = max(1, LONGEST // 2 // max(shape))
    inside = (
        max(0.0, box[0] + left),
        max(0.0, box[1] + top),
        min(float(canvas.width), box[2] + left),
        min(float(canvas.height), box[3] + top),
    )
    return canvas.resize((shape[1] * scale, shape[0] * scale), Image.Resampling.BICUBIC, box=inside)
