"""Slot maps, and the pruner that ships for llava-mini."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import llava
from llava.command import read_methods
from llava.eval.encoder import Encoder
from llava.eval.slot_maps import NONE, SlotMap, draw_slots, slot_map
from llava.eval.views import View
from llava.pruning import PruningConfig, VisualTokens
from llava.pruning.methods.ocvtp.checkpoint import EMBEDDED, PrunerFiles
from llava.pruning.methods.ocvtp.pruner import OCVTP
from noise_images import noise
from tiny_llava import build, save_tower
from tiny_ocvtp import save_pruner


@pytest.fixture(scope="module")
def anyres(tmp_path_factory):
    return build(
        save_tower(tmp_path_factory.mktemp("tower")),
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )


@pytest.mark.parametrize("budget", [{}, {"budget": "effective_rank", "reference_rank": 100.0}])
def test_a_slot_map_covers_the_patches_and_shows_what_is_kept(anyres, tmp_path, budget):
    image = noise(84, 112)
    config = PruningConfig("ocvtp", 0.3, options={"checkpoint": save_pruner(tmp_path), **budget})
    encoder = Encoder(anyres, anyres.get_vision_tower().image_processor)
    found, views = slot_map(encoder, image, config), encoder.views([image])[0]
    patches = np.concatenate([view.patches.ravel() for view in views])
    newlines = np.setdiff1d(np.arange(len(found.slot)), patches)
    assert (found.slot[patches] >= 0).all() and (found.slot[newlines] == NONE).all()
    assert found.kept.nonzero()[0].tolist() == sorted(encoder.kept_order(image, config))
    assert found.claimed.any() and (found.kept | ~found.claimed).all()
    figure = draw_slots(views, found)
    assert len(figure.axes) == 4
    assert [axis.get_title() for axis in figure.axes[1::2]] == [
        f"{found.kept[view.patches].sum()} kept, {found.claimed[view.patches].sum()} claimed by slots" for view in views
    ]


def test_slots_have_their_colour_and_dropped_patches_none():
    view = View("image", Image.new("RGB", (40, 40), (0, 0, 0)), np.arange(4).reshape(2, 2))
    yes, no = np.array([True, False, False, False]), np.array([True, True, False, False])
    left, right = draw_slots([view], SlotMap(np.array([0, 1, 1, 0]), yes, no)).axes
    regions, kept = (axis.images[0].get_array() for axis in (left, right))
    assert (regions[0, 0] == regions[-1, -1]).all() and (regions[0, 0] != regions[0, -1]).any()
    assert (kept[0, :] == regions[0, :]).all() and (kept[-1] == 235).all()
    assert len(right.collections[0].get_offsets()) == 1


def test_slots_of_single_crops_or_of_distinct_patches_are_not_drawn(tmp_path):
    for option in ("per_crop", "drop_duplicates"):
        config = PruningConfig("ocvtp", 0.3, options={"checkpoint": save_pruner(tmp_path), option: True})
        with pytest.raises(ValueError, match=f"leave out OCVTP_{option.upper()}"):
            slot_map(None, None, config)


def test_the_options_of_a_token_map_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OCVTP_CHECKPOINT", save_pruner(tmp_path))
    configs = read_methods("ocvtp:top_k=2,random", 0.2)
    assert dict(configs["ocvtp:top_k=2"].options) == {"checkpoint": str(tmp_path), "top_k": 2}


def test_the_pruner_that_ships_fits_the_model_that_ships():
    files = PrunerFiles.find(EMBEDDED)
    tower = json.loads((Path(llava.__file__).parent / "mini/checkpoint/vision_tower/config.json").read_text())
    OCVTP().check_model(None, tower["hidden_size"])
    # The last of the tower's layers does not run.
    assert 0 <= files.config.layer < tower["num_hidden_layers"] - 1
    assert files.config.trained_on["model"] == EMBEDDED and files.config.trained_on["pictures"].startswith("scenes:")
    assert sum(file.stat().st_size for file in files.path.iterdir()) < 2e6
    features = torch.randn(1, 576, tower["hidden_size"])
    tokens_seen = VisualTokens(features, 56, layer_features=features, received_attention=torch.rand(1, 576, 1))
    assert OCVTP().indices(tokens_seen).shape == (1, 56)
