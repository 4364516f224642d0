"""Token maps: every kept token is drawn where it stands in the picture."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from llava.eval import tokens
from llava.eval.encoder import Encoder
from llava.eval.transport import objective_kernel
from llava.eval.views import View
from llava.model.llava_arch import greedy_select
from llava.pruning import PruningConfig
from noise_images import noise
from tiny_llava import build, save_tower

GRID = [[56, 112], [112, 56], [112, 112]]
SIZE = (640, 427)
"""Fits the 112 x 112 grid: 8 columns of patches, and 6 rows once the bars are cut off."""


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return save_tower(tmp_path_factory.mktemp("tower"))


def views(tower, size, **settings):
    """Of an image in a model of these settings, and how many visual tokens it has."""
    looking, image = (
        Encoder(build(tower, **settings), CLIPImageProcessor.from_pretrained(tower)),
        Image.new("RGB", size),
    )
    return looking.views([image])[0], len(looking.encode(image, PruningConfig("first_k", 1.0)))


def anyres(merge: str) -> dict:
    return {"image_aspect_ratio": "anyres", "image_grid_pinpoints": GRID, "mm_patch_merge_type": merge}


def test_anyres_patches_skip_the_newlines(tower):
    (base, crops), _ = views(tower, SIZE, **anyres("spatial_unpad"))
    assert base.patches.shape == (4, 4) and crops.patches.shape == (6, 8)
    assert crops.patches[0, 0] == 16 and crops.patches[1, 0] - crops.patches[0, -1] == 2


def test_anyres_without_unpadding_has_no_newlines(tower):
    (_, crops), _ = views(tower, SIZE, **anyres("spatial"))
    assert crops.patches.shape == (8, 8) and crops.patches[1, 0] - crops.patches[0, -1] == 1


@pytest.mark.parametrize("size", [(100, 50), (64, 64), (40, 90)])
def test_the_patches_are_all_of_the_models_tokens(tower, size):
    found, total = views(tower, size, **anyres("spatial_unpad"))
    placed = np.concatenate([view.patches.ravel() for view in found])
    newlines = found[1].patches.shape[0]
    assert len(set(placed)) == len(placed) == total - newlines and placed.max() < total


def test_dropped_patches_are_faded_and_kept_ones_are_not():
    view = View("image", Image.new("RGB", (40, 40), (10, 20, 30)), np.arange(4).reshape(2, 2))
    drawn = tokens.dimmed(view, [3])
    assert drawn[-1, -1].tolist() == [10, 20, 30]
    assert (drawn[0, 0] > 150).all() and (drawn[0, -1] > 150).all() and (drawn[-1, 0] > 150).all()


def test_otprune_is_listed_in_greedy_order(tower):
    encoder = Encoder(build(tower), CLIPImageProcessor.from_pretrained(tower))
    image = noise(56, 56)
    config = PruningConfig("otprune", 0.25)
    order = encoder.kept_order(image, config)
    everything, kept = encoder.reduce(image, config)
    assert sorted(order) == kept.indices.tolist() != order
    assert order == greedy_select(objective_kernel(everything.features), 4).tolist()


def test_the_csv_has_one_line_per_token(tmp_path):
    image = Image.new("RGB", (8, 8))
    crops = np.arange(16, 24).reshape(1, 8)
    found = [View("base view", image, np.arange(16).reshape(4, 4)), View("crops", image, crops)]
    tokens.write_csv(tmp_path / "map.csv", found, {"first_k": [0, 5, 16, 24]})
    rows = list(csv.reader((tmp_path / "map.csv").open()))[1:]
    assert rows == [
        ["first_k", "1", "0", "base view", "0", "0"],
        ["first_k", "2", "5", "base view", "1", "1"],
        ["first_k", "3", "16", "crops", "0", "0"],
        ["first_k", "4", "24", "newline", "", ""],
    ]
