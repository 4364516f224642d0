"""The views of an image that its visual tokens cover, and the position of each token on them.

Where a model's input pixels come from is measured, whatever its processor does with an image: it gets images of the
same sizes whose colours encode the pixels' positions, and how it scales, squeezes, cuts into tiles, pads or crops is
read off its output. No family's preprocessing is written down here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from PIL import Image

from llava.images import REDUCING_GAP
from llava.pruning.tokens import Layout, TokenGrid

Tiles = list[list[torch.Tensor]]
"""For each entry of an encoder's output, the normalised pixels (3, H, W) of its tiles."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of an image; beyond its edges where the processor pads."""
NOTHING = -1
"""In a view's patches: no token."""
PADDING = (122, 116, 104)
"""LLaVA's colour for what lies beyond an image's edges."""
LONGEST = 1344
"""Pixels that an image is shrunk to before it is cut into views."""


@dataclass(frozen=True)
class View:
    """A part of an image (RGB) that visual tokens cover: "image", "base view" or "crops".

    ``patches`` (rows, columns), int: the index of the visual token at each patch, or `NOTHING`.
    """

    name: str
    image: Image.Image
    patches: np.ndarray

    @property
    def scale(self) -> int:
        """Pixels that a patch is drawn with."""
        return max(1, round(480 / max(self.patches.shape)))

    def pixels(self) -> np.ndarray:
        """The view as it is drawn: (rows * scale, columns * scale, 3), float32."""
        rows, columns = self.patches.shape
        return np.asarray(self.image.resize((columns * self.scale, rows * self.scale)), dtype=np.float32)

    def enlarged(self, values: np.ndarray) -> np.ndarray:
        """The values of the patches, (rows, columns) or (rows, columns, C), as large as `pixels`: (H, W, C or 1)."""
        values = values[..., None] if values.ndim == 2 else values
        return values.repeat(self.scale, 0).repeat(self.scale, 1)


@dataclass(frozen=True)
class Part:
    """A grid of an image's tokens: the token's index at each patch (rows, columns), and the box that they cover."""

    patches: np.ndarray
    box: Box

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels of the image."""
        left, top, right, bottom = self.box
        return right - left, bottom - top


def parts_of(layout: Layout, tiles: Sequence[Tile | None], size: tuple[int, int], first: int = 0) -> list[Part]:
    """Where the grids of a layout lie on an image of a size (width, height).

    There is one grid for each tile, or one for the first and one for all others together; ``first`` is the index of the
    first token.
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
    """What a grid of several tiles covers, by the tile that shows most of the image."""
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
    """What the parts of an image (RGB) cover, tiles of the same size as one view."""
    groups: list[list[Part]] = []
    for part in parts:
        beside = next((group for group in groups if all(_lie_side_by_side(part, other) for other in group)), None)
        if beside is None:
            groups.append(beside := [])
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
    beyond = (-box[0], -box[1], box[2] - image.width, box[3] - image.height)
    left, top, right, bottom = (max(0, ceil(pixels - 0.01)) for pixels in beyond)
    canvas = Image.new("RGB", (left + image.width + right, top + image.height + bottom), PADDING)
    canvas.paste(image, (left, top))
    scale = max(1, LONGEST // 2 // max(shape))
    inside = max(0.0, box[0] + left), max(0.0, box[1] + top)
    inside += min(float(canvas.width), box[2] + left), min(float(canvas.height), box[3] + top)
    return canvas.resize((shape[1] * scale, shape[0] * scale), Image.Resampling.BICUBIC, box=inside)


@dataclass(frozen=True)
class Tile:
    """What a tile shows: the image by its number, the part of it, and the share of the tile that is not padding."""

    image: int
    box: Box
    content: float


def locate(tiles_of: Callable[[list[Image.Image]], Tiles], sizes: Sequence[tuple[int, int]]) -> list[list[Tile | None]]:
    """What each tile shows of images of these sizes (width, height); None for a tile of padding alone.

    ``tiles_of`` gives the tiles of RGB images of these sizes.
    """
    black, white = ([Image.new("RGB", size, colour) for size in sizes] for colour in ("black", "white"))
    coded = [_coded(size, (number + 1) / (len(sizes) + 1)) for number, size in enumerate(sizes)]
    shown = zip(*map(tiles_of, (black, white, coded)), strict=True)
    return [[_tile(*tile, sizes) for tile in zip(*entry, strict=True)] for entry in shown]


def _coded(size: tuple[int, int], blue: float) -> Image.Image:
    """Red is a pixel's relative position from the left, green from the top; blue is the image's number."""
    width, height = size
    pixels = np.empty((height, width, 3))
    pixels[..., 0] = (np.arange(width) + 0.5) / width
    pixels[..., 1] = ((np.arange(height) + 0.5) / height)[:, None]
    pixels[..., 2] = blue
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))


def _tile(
    black: torch.Tensor, white: torch.Tensor, coded: torch.Tensor, sizes: Sequence[tuple[int, int]]
) -> Tile | None:
    """Rescaling and normalising, which are linear, cancel out; padding is the same in all three."""
    span = (white - black).double().mean(dim=0)  # (H, W)
    content = span > 0.5 * span.max()
    if not bool(span.max() > 0):
        return None
    values = (coded - black).double() / (white - black).double().where(content, torch.ones(()).double())
    image = round(float(values[2][content].median()) * (len(sizes) + 1)) - 1
    width, height = sizes[image]
    left, right = _ends(values[0], content, width)
    top, bottom = _ends(values[1].T, content.T, height)
    box = left * width, top * height, right * width, bottom * height
    return Tile(image, box, float(content.double().mean()))


def _ends(values: torch.Tensor, content: torch.Tensor, pixels: int) -> tuple[float, float]:
    """Both ends of the line through the columns of ``values`` (H, W), 0 to 1 over ``pixels``."""
    counts = content.sum(dim=0)
    columns = counts.nonzero().flatten()
    means = (values * content).sum(dim=0)[columns] / counts[columns]
    # An enlarged image is constant beyond the centres of its outermost pixels.
    inner = (means > 0.6 / pixels) & (means < 1 - 0.6 / pixels)
    x, y = columns[inner] + 0.5, means[inner]
    if len(x) < 2 or float(y.max() - y.min()) < 2 / 255:  # too thin to tell: all of it
        first, count = float(columns[0]), float(columns[-1] - columns[0] + 1)
        return -first / count, (values.shape[1] - first) / count
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    start = float(y.mean() - slope * x.mean())
    return start, start + slope * values.shape[1]
