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
from tiny_llava import build, save_tower


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return save_tower(tmp_path_factory.mktemp("tower"))


def test_dropped_patches_are_faded_and_kept_ones_are_not():
    view = View("image", Image.new("RGB", (40, 40), (10, 20, 30)), np.arange(4).reshape(2, 2))
    drawn = tokens.dimmed(view, [3])
    assert drawn[-1, -1].tolist() == [10, 20, 30]
    assert (drawn[0, 0] > 150).all() and (drawn[0, -1] > 150).all() and (drawn[-1, 0] > 150).all()


def test_otprune_is_listed_in_greedy_order(tower):
    encoder = Encoder(build(tower), CLIPImageProcessor.from_pretrained(tower))
    image = Image.effect_noise((56, 56), 80).convert("RGB")
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
