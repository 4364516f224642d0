"""Anyres images of any shape: unpadding may leave a row, a column, or nothing but newlines of a thin image's crops."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from llava.eval import tokens
from llava.eval.encoder import Encoder
from llava.eval.token_page import token_page
from llava.mm_utils import process_images
from llava.model.image_tokens import merge_crops, token_grid
from llava.pruning import available_methods, kept_count, pruning
from llava.pruning.registry import method_class
from llava.pruning.tokens import crop_numbers
from tiny_llava import build, prompt
from tiny_methods import OPTIONS as TINY_OPTIONS
from tiny_methods import RATIOS
from tiny_trained import trained_networks

GRID = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
THIN = [(1, size) for size in range(1, 2001)] + [(size, 1) for size in range(2, 2001)]


def drawn_sizes(count: int) -> list[tuple[int, int]]:
    """Sides from 1 to 2000, short ones as likely as long ones."""
    draw = random.Random(15)
    return [(round(2000 ** draw.random()), round(2000 ** draw.random())) for _ in range(count)]


@pytest.fixture(scope="module")
def anyres(tower):
    return build(tower, image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=GRID)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return TINY_OPTIONS | trained_networks(tmp_path_factory.mktemp("trained"))


def test_the_token_grid_every_size_is_that_of_its_tokens():
    newline = torch.full((1,), -1.0)
    shapes = set()
    for size in THIN + drawn_sizes(200):
        grid = ((3, 1) if size[0] > size[1] else (1, 3)) if size[0] != size[1] else (2, 2)
        crops = 1 + grid[0] * grid[1]
        # Every patch is the number of its crop.
        numbers = torch.arange(crops).view(-1, 1, 1).expand(-1, 16, 1)
        merged = merge_crops(numbers.float(), size, grid, newline).flatten()
        layout = token_grid(crops, 16, size, grid, spatial=True, newline=True)
        shapes.add(layout)
        assert torch.equal(torch.cat([part.is_newline() for part in layout]), merged == -1), size
        found = crop_numbers(layout)
        # Crops are numbered without gaps; the patches of one are the same crop's.
        assert sorted(set(found.tolist())) == list(range(int(found.max()) + 1)), size
        patches = merged >= 0
        assert len(set(zip(found[patches].tolist(), merged[patches].tolist(), strict=True))) == len(
            set(merged[patches].tolist())
        )
        pieces = [piece for part in layout for piece in part.split()]
        assert [len(piece) for piece in pieces] == found.bincount().tolist(), size
    assert any(len(layout) == 1 for layout in shapes) and any(layout[-1].columns == 0 for layout in shapes)


SHAPES = pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 2000), (2000, 1), (730, 10), (10, 730), *drawn_sizes(4)],
    ids=lambda size: "{}x{}".format(*size),
)


def pixels_of(model, size):
    image = Image.new("RGB", size, (200, 30, 90))
    return process_images([image], model.get_vision_tower().image_processor, model.config)


@SHAPES
def test_every_method_prunes_an_image_of_any_shape(anyres, options, size):
    call = {"input_ids": prompt(3, 5)[None], "images": pixels_of(anyres, size), "image_sizes": [size]}
    with torch.no_grad():
        total = anyres(**call).logits.shape[1] - 9  # the text
        for method in available_methods():
            layers = [None] if method in RATIOS else {method_class(method)().default_layer, 2}
            for layer, per_crop in itertools.product(layers, (False, True)):
                settings = {"ratio": RATIOS.get(method, 0.3), "layer": layer, "per_crop": per_crop}
                with pruning(anyres, method, **settings, **options.get(method, {})):
                    logits = anyres(**call).logits
                assert torch.isfinite(logits).all(), (method, settings)
                seen, kept = anyres.visual_token_counts[0]
                assert seen == total, (method, settings)
                assert method in RATIOS or kept == kept_count(total, 0.3), (method, settings)


@SHAPES
def test_a_token_map_shows_every_patch_of_an_image_of_any_shape(anyres, size, tmp_path):
    total = len(anyres.visual_tokens(pixels_of(anyres, size), [size])[0])
    looking = Encoder(anyres, anyres.get_vision_tower().image_processor)
    [views] = looking.views([Image.new("RGB", size)])
    placed = np.concatenate([view.patches.ravel() for view in views])
    newlines = sum(part.is_newline().sum() for part in anyres.image_tokens(pixels_of(anyres, size), [size])[0].layout)
    assert len(set(placed)) == len(placed) == total - newlines and placed.max() < total
    kept = {"uniform": list(range(0, total, 3))}
    tokens.draw(views, kept).savefig(tmp_path / "map.png", dpi=20)
    assert token_page(views, kept, "image")
