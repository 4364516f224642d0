"""Token maps: which visual tokens a method keeps, drawn on the image.

    python -m llava.eval.tokens --image cat.jpg --method otprune,random --ratio 0.098 --output maps/

writes one PNG per image with the methods side by side, a CSV with every kept token, for ocvtp a PNG of its slots, and
with --html a page that steps through the selection. Of methods that drop inside the decoder it shows the tokens left
after the last drop. Options that --method leaves out come from a method's environment variables.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava import files
from llava.command import Parser, find_device, read_methods
from llava.eval.encoder import Encoder
from llava.eval.token_page import token_page
from llava.eval.views import View
from llava.files import atomic_write, check_writable
from llava.mm_utils import load_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIMMED = 0.22
WIDTH, TITLE = 4.2, 0.3
"""Of a map and of the line above it, in inches."""


def draw(views: Sequence[View], kept: Mapping[str, Sequence[int]], order: bool = False) -> Figure:
    """A column per method, a row per view, dropped tokens dimmed.

    ``kept`` are token indices by method; with ``order`` each token's rank in the list is written on its patch.
    """
    from matplotlib.figure import Figure

    heights = [WIDTH * view.patches.shape[0] / view.patches.shape[1] + TITLE for view in views]
    figure = Figure(figsize=(WIDTH * len(kept), sum(heights)), layout="constrained")
    axes = figure.subplots(len(views), len(kept), squeeze=False, height_ratios=heights)
    for view, row in zip(views, axes, strict=True):
        for axis, (method, indices) in zip(row, kept.items(), strict=True):
            axis.imshow(dimmed(view, indices), interpolation="nearest")
            inside = np.isin(view.patches, indices)
            axis.set_title(f"{method}: {inside.sum()} of {view.patches.size} ({view.name})", fontsize=11)
            axis.set_axis_off()
            if order:
                _number(axis, view, indices)
    return figure


def dimmed(view: View, indices: Sequence[int]) -> np.ndarray:
    """The view (H, W, 3), uint8, with dropped patches faded to grey."""
    pixels = view.pixels()
    faded = DIMMED * pixels + (1 - DIMMED) * 235
    return np.where(view.enlarged(np.isin(view.patches, indices)), pixels, faded).astype(np.uint8)


def _number(axis, view: View, indices: Sequence[int]) -> None:
    # Three digits fit a patch; 72 points are an inch.
    size = min(5.0, 0.4 * 72 * WIDTH / view.patches.shape[1])
    box = {"boxstyle": "round,pad=0.1", "facecolor": "black", "linewidth": 0, "alpha": 0.6}
    for rank, index in enumerate(indices, start=1):
        for y, x in np.argwhere(view.patches == index) + 0.5:
            spot = x * view.scale, y * view.scale
            axis.text(*spot, rank, fontsize=size, ha="center", va="center", color="white", bbox=box)


def write_csv(path: Path, views: Sequence[View], kept: Mapping[str, Sequence[int]]) -> None:
    """One line per kept token: method, rank in the list, token index, view, row and column (empty for a newline)."""
    spots = {int(index): (view.name, y, x) for view in views for (y, x), index in np.ndenumerate(view.patches)}
    lines = [
        [method, rank, index, *spots.get(index, ("newline", "", ""))]
        for method, indices in kept.items()
        for rank, index in enumerate(indices, start=1)
    ]
    files.write_csv(path, ["method", "rank", "token", "view", "row", "column"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("llava.eval.tokens", __doc__)
    parser.add_image(several=True)
    parser.add_model()
    parser.add_method("otprune")
    parser.add_ratio()
    parser.add_query()
    parser.add_argument("--order", action="store_true", help="number the tokens (OTPrune: in greedy order)")
    parser.add_argument("--html", action="store_true", help="also write a page that steps through the selection")
    parser.add_device()
    parser.add_output("token_maps", folder=True)
    return parser.run(_draw_maps, argv)


def _draw_maps(arguments: argparse.Namespace) -> None:
    configs, device = read_methods(arguments.method, arguments.ratio), find_device(arguments.device)
    stems = [f"{arguments.output / Path(file).stem}_{arguments.ratio:g}" for file in arguments.image]
    if twice := next((stem for number, stem in enumerate(stems) if stem in stems[:number]), None):
        raise ValueError(f"two images would both be drawn as {twice}.png: give their files other names")
    for stem in stems:
        check_writable(f"{stem}.png")
    images = list(map(load_image, arguments.image))
    encoder = Encoder.load(arguments.model, device)
    kept = {name: encoder.kept(images, config, arguments.query) for name, config in configs.items()}
    slots = next((config for config in configs.values() if config.method == "ocvtp"), None)
    written = []
    for number, (stem, image, views) in enumerate(zip(stems, images, encoder.views(images), strict=True)):
        own = {name: of_images[number][1] for name, of_images in kept.items()}
        _save(f"{stem}.png", draw(views, own, arguments.order))
        write_csv(Path(f"{stem}.csv"), views, own)
        written += [f"{stem}.png", f"{stem}.csv"]
        if slots:
            from llava.eval.slot_maps import draw_slots, slot_map

            written.append(f"{stem}_slots.png")
            _save(written[-1], draw_slots(views, slot_map(encoder, image, slots)))
        if arguments.html:
            written.append(f"{stem}.html")
            atomic_write(written[-1], token_page(views, own, Path(arguments.image[number]).name))
        for method, of_images in kept.items():
            total, indices = of_images[number]
            where = f" in {Path(arguments.image[number]).name}" if len(images) > 1 else ""
            print(f"{method}: {len(indices)} of {total} visual tokens kept{where}")
    print(f"written: {', '.join(written)}")


def _save(path: str, figure: Figure) -> None:
    atomic_write(path, lambda part: figure.savefig(part, format="png", dpi=110))


if __name__ == "__main__":
    raise SystemExit(main())
