"""Where the pixels that a model is given come from, whatever its processor does with an image.

The processor is shown images of the same sizes whose colours say where a pixel stands: what it scales, squeezes, cuts
into tiles, pads or crops is then read off its output. So no family's way of preparing images is written down here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

Tiles = list[list[torch.Tensor]]
"""For each entry of an encoder's output, the normalised pixels (3, H, W) of its tiles."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of an image; beyond its edges where the processor pads."""


@dataclass(frozen=True)
class Tile:
    """What a tile shows.

    Attributes
    ----------
    image : int
        Number of the image.
    box : Box
        What of it.
    content : float
        Share of the tile that is not padding.
    """

    image: int
    box: Box
    content: float


def locate(tiles_of: Callable[[list[Image.Image]], Tiles], sizes: Sequence[tuple[int, int]]) -> list[list[Tile | None]]:
    """What each tile shows of images of these sizes (width, height); None for a tile of padding alone.

    Parameters
    ----------
    tiles_of : callable
        RGB images of these sizes -> their tiles.
    """
    black, white = ([Image.new("RGB", size, colour) for size in sizes] for colour in ("black", "white"))
    coded = [_coded(size, (number + 1) / (len(sizes) + 1)) for number, size in enumerate(sizes)]
    shown = zip(*map(tiles_of, (black, white, coded)), strict=True)
    return [[_tile(*tile, sizes) for tile in zip(*entry, strict=True)] for entry in shown]


def _coded(size: tuple[int, int], blue: float) -> Image.Image:
    """Red says how far to the right a pixel stands, green how far down, blue which image's it is."""
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
    """The line through the columns of ``values`` (H, W), 0 to 1 over ``pixels``: what it is at both ends."""
    counts = content.sum(dim=0)
    columns = counts.nonzero().flatten()
    means = (values * content).sum(dim=0)[columns] / counts[columns]
    # An enlarged image is flat beyond the middles of its outermost pixels.
    inner = (means > 0.6 / pixels) & (means < 1 - 0.6 / pixels)
    x, y = columns[inner] + 0.5, means[inner]
    if len(x) < 2 or float(y.max() - y.min()) < 2 / 255:  # too thin to tell: all of it
        first, count = float(columns[0]), float(columns[-1] - columns[0] + 1)
        return -first / count, (values.shape[1] - first) / count
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    start = float(y.mean() - slope * x.mean())
    return start, start + slope * values.shape[1]
