"""Token maps: which visual tokens a method keeps, drawn on the picture.

    python -m llava.eval.tokens --image cat.jpg --method otprune,random --ratio 0.098 --output maps/

writes one PNG with the methods side by side, a CSV with every kept token, for ocvtp a PNG of its slots, and with --html
a page that steps through the selection. A method's options come from its environment variables.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llava import files
from llava.command import Parser, find_device, read_methods
from llava.eval.token_page import token_page
from llava.eval.views import View, views_of
from llava.files import atomic_write, check_writable
from llava.mm_utils import get_model_name_from_path, load_image, process_images
from llava.model.llava_arch import ot_select
from llava.model.visual_sequence import ImageTokens, PromptFacts, reduce_images
from llava.pruning import PruningConfig, kept_count, pruning
from llava.pruning.base import content_key

DIMMED = 0.22
WIDTH, TITLE = 4.2, 0.3
"""Of a map and of the line above it, in inches."""


@torch.no_grad()
def kept_order(model, pixels: torch.Tensor, size: tuple[int, int], config: PruningConfig) -> list[int]:
    """Tokens that a method keeps of one image: in greedy order for OTPrune, as they go on for the others.

    Raises
    ------
    ValueError
        For a method that needs more than the picture: a question, or attention inside the decoder; for a picture
        without visual tokens.
    """
    with pruning(model, config):
        image = model.image_tokens([pixels], [size])[0]
    if not len(image.features):
        raise ValueError("the picture has no visual tokens")
    return listed(image, PromptFacts(key=content_key(pixels)), config)


def listed(image: ImageTokens, facts: PromptFacts, config: PruningConfig) -> list[int]:
    """`kept_order` of an image's tokens, given what the method needs beside them."""
    pruner = config.build_pruner()
    if config.method == "otprune" and not pruner.compat and not pruner.per_crop:
        k = kept_count(len(image.features), config.ratio)
        return ot_select(image.features, k, pruner.for_width(image.features.shape[-1]).gamma).tolist()
    return reduce_images(pruner, [image], [facts], config.ratio)[0].indices.tolist()


def draw(views: list[View], kept: dict[str, list[int]], order: bool = False):
    """A figure: a column a method, a row a view, what was dropped dimmed.

    Parameters
    ----------
    views : list of View
    kept : dict of method -> token indices
    order : bool
        Write each token's place in the list on its patch.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure

    heights = [WIDTH * view.patches.shape[0] / view.patches.shape[1] + TITLE for view in views]
    figure = Figure(figsize=(WIDTH * len(kept), sum(heights)), layout="constrained")
    axes = figure.subplots(len(views), len(kept), squeeze=False, height_ratios=heights)
    for row, view in enumerate(views):
        for column, (method, indices) in enumerate(kept.items()):
            axis = axes[row][column]
            axis.imshow(dimmed(view, indices), interpolation="nearest")
            inside = np.isin(view.patches, indices)
            axis.set_title(f"{method}: {inside.sum()} of {view.patches.size} ({view.name})", fontsize=11)
            axis.set_axis_off()
            if order:
                _number(axis, view, indices)
    return figure


def dimmed(view: View, indices: list[int]) -> np.ndarray:
    """The picture with the patches that were dropped faded to grey."""
    rows, columns = view.patches.shape
    scale = _scale(view)
    picture = np.asarray(view.picture.resize((columns * scale, rows * scale)), dtype=np.float32)
    kept = np.isin(view.patches, indices).repeat(scale, 0).repeat(scale, 1)[..., None]
    faded = DIMMED * picture + (1 - DIMMED) * 235
    return np.where(kept, picture, faded).astype(np.uint8)


def _number(axis, view: View, indices: list[int]) -> None:
    scale = _scale(view)
    place = {int(index): (x, y) for (y, x), index in np.ndenumerate(view.patches)}
    # Three digits fit a patch; 72 points are an inch.
    size = min(5.0, 0.4 * 72 * WIDTH / view.patches.shape[1])
    box = {"boxstyle": "round,pad=0.1", "facecolor": "black", "linewidth": 0, "alpha": 0.6}
    for rank, index in enumerate(indices, start=1):
        if index in place:
            x, y = ((coordinate + 0.5) * scale for coordinate in place[index])
            axis.text(x, y, rank, fontsize=size, ha="center", va="center", color="white", bbox=box)


def _scale(view: View) -> int:
    """Pixels a patch is drawn with."""
    return max(1, round(480 / max(view.patches.shape)))


def write_csv(path: Path, views: list[View], kept: dict[str, list[int]]) -> None:
    """One line a kept token: method, place in the list, token index, view, row and column (empty for a newline)."""
    place = {int(index): (view.name, y, x) for view in views for (y, x), index in np.ndenumerate(view.patches)}
    lines = [
        [method, rank, index, *place.get(index, ("newline", "", ""))]
        for method, indices in kept.items()
        for rank, index in enumerate(indices, start=1)
    ]
    files.write_csv(path, ["method", "rank", "token", "view", "row", "column"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("llava.eval.tokens", __doc__)
    parser.add_image()
    parser.add_model()
    parser.add_method("otprune")
    parser.add_ratio()
    parser.add_argument("--order", action="store_true", help="number the tokens (OTPrune: in greedy order)")
    parser.add_argument("--html", action="store_true", help="also write a page that steps through the selection")
    parser.add_device()
    parser.add_output("token_maps", folder=True)
    return parser.run(_draw_maps, argv)


def _draw_maps(arguments: argparse.Namespace) -> None:
    configs, device = read_methods(arguments.method, arguments.ratio), find_device(arguments.device)
    stem = arguments.output / f"{Path(arguments.image).stem}_{arguments.ratio:g}"
    check_writable(f"{stem}.png")
    from llava.model.builder import load_pretrained_model

    image = load_image(arguments.image)
    dtype = torch.float32 if device == "cpu" else torch.float16
    _, model, processor, _ = load_pretrained_model(
        arguments.model,
        None,
        get_model_name_from_path(arguments.model),
        device=device,
        dtype=dtype,
        multimodal=True,
    )
    pixels = process_images([image], processor, model.config)[0].to(model.device, dtype)
    views = views_of(image, model.config, model.get_vision_tower())
    kept = {name: kept_order(model, pixels, image.size, config) for name, config in configs.items()}
    total = len(model.visual_tokens([pixels], [image.size])[0])

    map_of_all = draw(views, kept, arguments.order)
    atomic_write(f"{stem}.png", lambda part: map_of_all.savefig(part, format="png", dpi=110))
    write_csv(stem.with_name(stem.name + ".csv"), views, kept)
    written = [f"{stem}.png", f"{stem}.csv"]
    if slots := next((config for config in configs.values() if config.method == "ocvtp"), None):
        from llava.eval.slot_maps import draw_slots, slot_map

        found = slot_map(model, pixels, image.size, slots)
        written.append(f"{stem}_slots.png")
        map_of_slots = draw_slots(views, found)
        atomic_write(written[-1], lambda part: map_of_slots.savefig(part, format="png", dpi=110))
    if arguments.html:
        written.append(f"{stem}.html")
        atomic_write(written[-1], token_page(views, kept, Path(arguments.image).name))
    for method, indices in kept.items():
        print(f"{method}: {len(indices)} of {total} visual tokens kept")
    print(f"written: {', '.join(written)}")


if __name__ == "__main__":
    raise SystemExit(main())
