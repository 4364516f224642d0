"""Token maps: every kept token is drawn where it stands in the picture."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from llava.eval import tokens
from llava.eval.encoder import Encoder
from llava.eval.transport import objective_kernel
from llava.eval.views import View, views_of
from llava.mm_utils import process_images
from llava.model.llava_arch import greedy_select
from llava.pruning import PruningConfig
from tiny_llava import build, save_tower

TOWER = SimpleNamespace(num_patches_per_side=24, config=SimpleNamespace(image_size=336))
GRID = [[336, 672], [672, 336], [672, 672]]


def anyres(merge: str) -> SimpleNamespace:
    return SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=GRID, mm_patch_merge_type=merge)


def test_anyres_patches_skip_the_newlines():
    """640 x 427 fits the 672 x 672 grid: 48 columns of patches and a newline, 32 rows once the bars are cut off."""
    base, crops = views_of(Image.new("RGB", (640, 427)), anyres("spatial_unpad"), TOWER)
    assert base.patches.shape == (24, 24) and crops.patches.shape == (32, 48)
    assert crops.patches[0, 0] == 576 and crops.patches[1, 0] - crops.patches[0, -1] == 2


def test_anyres_without_unpadding_has_no_newlines():
    _, crops = views_of(Image.new("RGB", (640, 427)), anyres("spatial"), TOWER)
    assert crops.patches.shape == (48, 48) and crops.patches[1, 0] - crops.patches[0, -1] == 1


@pytest.mark.parametrize("size", [(100, 50), (64, 64), (40, 90)])
def test_the_patches_are_all_of_the_models_tokens(tmp_path, size):
    grid = [[56, 112], [112, 56], [112, 112]]
    model = build(
        save_tower(tmp_path),
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=grid,
    )
    image = Image.new("RGB", size)
    views = views_of(image, model.config, model.get_vision_tower())
    pixels = process_images([image], model.get_vision_tower().image_processor, model.config)[0]
    total = len(model.visual_tokens([pixels], [size])[0])
    placed = np.concatenate([view.patches.ravel() for view in views])
    newlines = views[1].patches.shape[0]
    assert len(set(placed)) == len(placed) == total - newlines and placed.max() < total


def test_dropped_patches_are_faded_and_kept_ones_are_not():
    view = View("image", Image.new("RGB", (40, 40), (10, 20, 30)), np.arange(4).reshape(2, 2))
    drawn = tokens.dimmed(view, [3])
    assert drawn[-1, -1].tolist() == [10, 20, 30]
    assert (drawn[0, 0] > 150).all() and (drawn[0, -1] > 150).all() and (drawn[-1, 0] > 150).all()


def test_otprune_is_listed_in_greedy_order(tmp_path):
    tower = save_tower(tmp_path)
    encoder = Encoder(build(tower), CLIPImageProcessor.from_pretrained(tower))
    image = Image.effect_noise((56, 56), 80).convert("RGB")
    config = PruningConfig("otprune", 0.25)
    order = encoder.kept_order(image, config)
    everything, kept = encoder.reduce(image, config)
    assert sorted(order) == kept.indices.tolist() != order
    assert order == greedy_select(objective_kernel(everything.features), 4).tolist()


def test_the_csv_has_one_line_a_token(tmp_path):
    views = views_of(Image.new("RGB", (640, 427)), anyres("spatial_unpad"), TOWER)
    tokens.write_csv(tmp_path / "map.csv", views, {"first_k": [0, 25, 576, 624]})
    rows = list(csv.reader((tmp_path / "map.csv").open()))[1:]
    assert rows == [
        ["first_k", "1", "0", "base view", "0", "0"],
        ["first_k", "2", "25", "base view", "1", "1"],
        ["first_k", "3", "576", "crops", "0", "0"],
        ["first_k", "4", "624", "newline", "", ""],
    ]
