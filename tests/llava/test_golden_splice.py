"""The splice and the pruned sequence against the published code, where the published code prunes the right rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig

from golden import golden_root
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.pruning import pruning

ROOT = golden_root() / "pruning"
CASES = json.loads((ROOT / "integration.json").read_text())["cases"]
PREFIX = 35


@pytest.fixture(scope="module")
def data():
    return np.load(ROOT / "integration.npz")


@pytest.fixture
def splice(tmp_path, data, monkeypatch):
    """Run a case through the model's own splice, with the golden vision features in the encoder's place."""
    CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=336, patch_size=56
    ).save_pretrained(tmp_path)

    def run(case, position_ids=None):
        config = LlavaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=64,
            mm_vision_tower=str(tmp_path),
            mm_vision_select_layer=-2,
            mm_projector_type="identity",
            mm_hidden_size=16,
            **case["cfg"],
        )
        model = LlavaLlamaForCausalLM(config)
        model.get_model().embed_tokens.weight.data = torch.from_numpy(data["embed_weight"])
        if "unpad" in case["cfg"]["mm_patch_merge_type"]:
            model.get_model().image_newline.data = torch.from_numpy(data["image_newline"])
        features = torch.from_numpy(data[f"{case['name']}/vision_features"])
        monkeypatch.setattr(model, "encode_images", lambda images: features[: len(images)])
        ids = torch.from_numpy(data[f"{case['name']}/input_ids"]).long()
        mask = None
        if f"{case['name']}/attention_mask_in" in data.files:
            mask = torch.from_numpy(data[f"{case['name']}/attention_mask_in"])
        crops = torch.zeros(len(features), 3, 336, 336)
        anyres = case["image_sizes"] is not None
        images = [crops] if anyres else crops

        def prepare():
            _, _, new_mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
                ids, position_ids, mask, None, None, images, case["image_sizes"]
            )
            return embeds.detach().numpy(), new_mask

        return model, ids, prepare

    return run


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_unpruned_sequences_are_the_published_ones(case, data, splice):
    _, _, prepare = splice(case)
    np.testing.assert_array_equal(prepare()[0], data[f"{case['name']}/embeds_unpruned"])


def prunes_the_right_rows(case) -> bool:
    """One image, standing where the published code expects it."""
    data = np.load(ROOT / "integration.npz")
    ids = data[f"{case['name']}/input_ids"]
    marks = (ids == IMAGE_TOKEN_INDEX).sum(axis=1)
    return marks.max() == 1 and ids[0, PREFIX] == IMAGE_TOKEN_INDEX and f"{case['name']}/OTPrune/embeds_pruned" in data


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES if prunes_the_right_rows(case)])
def test_compat_sequences_are_the_published_ones(case, data, splice):
    """Row 0 only: the published code applies its choice to every row."""
    model, _, prepare = splice(case)
    with pruning(model, "otprune", ratio=case["ratio"], compat=True):
        embeds, _ = prepare()
    np.testing.assert_array_equal(embeds[0], data[f"{case['name']}/OTPrune/embeds_pruned"][0])


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES if prunes_the_right_rows(case)])
def test_by_default_the_same_tokens_come_in_raster_order(case, data, splice):
    model, _, prepare = splice(case)
    full = prepare()[0][0]
    with pruning(model, "otprune", ratio=case["ratio"], gamma=0.01):
        embeds = prepare()[0][0]
    chosen = np.sort(data[f"{case['name']}/OTPrune/selected_visual_relative"])
    visual = model.visual_token_counts[0][0]
    expected = np.concatenate([full[:PREFIX], full[PREFIX : PREFIX + visual][chosen], full[PREFIX + visual :]])
    np.testing.assert_array_equal(embeds[: len(expected)], expected)


@pytest.mark.parametrize("name", ["explicit_position_ids", "ratio_gives_zero_tokens"])
def test_what_the_published_code_fails_on_works(name, splice):
    case = next(case for case in CASES if case["name"] == name)
    positions = None
    if name == "explicit_position_ids":
        positions = torch.arange(splice(case)[1].shape[1])[None]
    model, ids, prepare = splice(case, positions)
    with pruning(model, "otprune", ratio=case["ratio"]):
        embeds, _ = prepare()
    kept = max(1, round(case["ratio"] * 36))
    assert embeds.shape[1] == ids.shape[1] - 1 + kept
