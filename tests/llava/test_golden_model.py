"""The model against the original LLaVA: loading, features, splice, logits, generation."""

from __future__ import annotations

import builtins
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from golden import golden_root
from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import unpad_image
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector

ROOT = golden_root() / "llava"
MANIFEST = json.loads((ROOT / "manifest.json").read_text())
TOLERANCES = MANIFEST["tolerances"]


def cases(kind: str):
    return [pytest.param(case, id=case["id"].split("/")[1]) for case in MANIFEST["cases"] if case["kind"] == kind]


@pytest.fixture(autouse=True)
def _inside_the_golden_folder(monkeypatch):
    """The checkpoints name their vision towers relative to it."""
    monkeypatch.chdir(ROOT)


def load(name: str, **kwargs):
    spec = MANIFEST["checkpoints"][name]
    return load_pretrained_model(
        spec["path"], spec["model_base"], spec["model_name"], device_map="cpu", device="cpu", **kwargs
    )


@functools.cache
def loaded(name: str):
    return load(name, dtype=torch.float32)


def model_of(case) -> torch.nn.Module:
    return loaded(case["checkpoint"])[1]


@pytest.fixture
def configured(request):
    """Set a case's configuration values for one call."""
    undo = []

    def apply(model, values):
        for key, value in values.items():
            had, old = hasattr(model.config, key), getattr(model.config, key, None)
            undo.append((model.config, key, had, old))
            if value == "__delete__":
                if had:
                    delattr(model.config, key)
            else:
                setattr(model.config, key, value)

    yield apply
    for config, key, had, old in reversed(undo):
        if had:
            setattr(config, key, old)
        elif hasattr(config, key):
            delattr(config, key)


def inputs_of(case):
    data = np.load(ROOT / case["file"])
    tensors = {key[3:]: torch.from_numpy(data[key]) for key in data.files if key.startswith("in_")}
    images = None
    if case["images"] == "tensor":
        images = tensors.pop("images")
    elif case["images"] == "list":
        count = sum(key.startswith("images_") for key in tensors)
        images = [tensors.pop(f"images_{i}") for i in range(count)]
    return data, tensors, images


@pytest.mark.parametrize("case", cases("load"))
def test_a_checkpoint_loads_as_in_the_original(case):
    expected = json.loads((ROOT / case["file"]).read_text())
    tokenizer, model, processor, context_len = load(case["checkpoint"])
    assert type(model).__name__ == expected["class"]
    assert type(model.config).__name__ == expected["config_class"]
    assert context_len == expected["context_len"]
    assert len(tokenizer) == expected["tokenizer_len"]
    for name, value in expected["tokenizer_ids"].items():
        assert getattr(tokenizer, f"{name}_token_id") == value
    assert tokenizer.padding_side == expected["padding_side"]
    assert tokenizer.model_max_length == expected["model_max_length"]
    for token, number in expected["added_token_ids"].items():
        assert tokenizer.convert_tokens_to_ids(token) == number
    assert model.config.vocab_size == expected["config_vocab_size"]
    assert not model.training

    dtypes = {str(parameter.dtype) for parameter in model.parameters()}
    assert dtypes == {"torch.float16"} == {f"torch.{name}" for name in expected["param_dtypes_after_load"]}

    facts = expected["image_processor"]
    assert processor.size["shortest_edge"] == facts["size"]["shortest_edge"]
    assert processor.crop_size["height"] == facts["crop_size"]["height"]
    assert list(processor.image_mean) == facts["image_mean"] and list(processor.image_std) == facts["image_std"]
    tower, facts = model.get_vision_tower(), expected["vision_tower"]
    for name in ("is_loaded", "hidden_size", "num_patches", "num_patches_per_side", "select_layer", "select_feature"):
        assert getattr(tower, name) == facts[name]
    assert list(tower.dummy_feature.shape) == facts["dummy_feature_shape"]

    state = model.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == expected["state_dict"]
    for key, facts in expected["weights"].items():
        values = state[key].double().flatten()
        # the stored weights are exact in float16; mean and std are float64 sums of them
        np.testing.assert_allclose(values.mean().item(), facts["mean"], rtol=1e-6, atol=1e-9)
        assert values[np.linspace(0, len(values) - 1, 8).astype(int)].tolist() == pytest.approx(
            facts["samples"], abs=1e-7
        )


@pytest.mark.parametrize("case", cases("vision_features"))
def test_vision_features(case):
    data = np.load(ROOT / case["file"])
    images = torch.from_numpy(data["in_images"])
    for variant in case["variants"]:
        args = SimpleNamespace(
            mm_vision_select_layer=variant["select_layer"], mm_vision_select_feature=variant["select_feature"]
        )
        features = CLIPVisionTower(case["tower"], args)(images)
        np.testing.assert_allclose(features, data[variant["key"]], **TOLERANCES["features_and_embeddings"])


def test_a_list_of_images_gives_a_list_of_features():
    case = cases("vision_features")[0].values[0]
    images = torch.from_numpy(np.load(ROOT / case["file"])["in_images"])
    tower = CLIPVisionTower(case["tower"], SimpleNamespace(mm_vision_select_layer=-2))
    torch.testing.assert_close(torch.cat(tower(list(images))), tower(images))


@pytest.mark.parametrize("case", cases("vision_in_checkpoint"))
def test_a_checkpoint_with_its_own_tower_uses_it(case):
    data, model = np.load(ROOT / case["file"]), model_of(case)
    images = torch.from_numpy(data["in_images"])
    features = model.get_vision_tower()(images)
    np.testing.assert_allclose(features, data["out_features"], **TOLERANCES["features_and_embeddings"])
    encoded = model.encode_images(images).detach()
    np.testing.assert_allclose(encoded, data["out_encoded"], **TOLERANCES["features_and_embeddings"])
    assert not np.allclose(features, data["out_folder_features"], atol=1e-2)


@pytest.mark.parametrize("case", cases("projector"))
def test_projector(case):
    config = SimpleNamespace(
        mm_projector_type=case["projector_type"],
        mm_hidden_size=case.get("mm_hidden_size"),
        hidden_size=case.get("hidden_size"),
    )
    if "raises" in case:
        with pytest.raises(ValueError, match=case["message"]):
            build_vision_projector(config)
        return
    projector = build_vision_projector(config)
    assert type(projector).__name__ == case["module"] and list(projector.state_dict()) == case["state_dict"]
    data = np.load(ROOT / case["file"])
    projector.load_state_dict({key: torch.from_numpy(data[f"weight:{key}"]) for key in case["state_dict"]})
    with torch.no_grad():
        out = projector(torch.from_numpy(data["in_x"]))
    np.testing.assert_allclose(out, data["out_y"], **TOLERANCES["features_and_embeddings"])


@pytest.mark.parametrize("case", cases("unpad_image"))
def test_unpad_image(case):
    data = np.load(ROOT / case["file"])
    index = json.loads((ROOT / case["index"]).read_text())
    for item in index:
        out = unpad_image(torch.from_numpy(data[f"in_{item['i']}"]), tuple(item["original_size"]))
        np.testing.assert_array_equal(out, data[f"out_{item['i']}"])


@pytest.mark.parametrize("case", cases("prepare"))
def test_prepare_inputs_labels_for_multimodal(case, configured):
    data, tensors, images = inputs_of(case)
    model = model_of(case)
    configured(model, case["config"])

    def prepare():
        return model.prepare_inputs_labels_for_multimodal(
            tensors["input_ids"],
            tensors.get("position_ids"),
            tensors.get("attention_mask"),
            None,
            tensors.get("labels"),
            images,
            case["image_sizes"],
        )

    if "raises" in case:
        with pytest.raises(getattr(builtins, case["raises"])):
            prepare()
        return
    names = ("input_ids", "position_ids", "attention_mask", "past_key_values", "inputs_embeds", "labels")
    for name, value in zip(names, prepare(), strict=True):
        if name in case["outputs_none"]:
            assert value is None, name
        elif name == "inputs_embeds":
            np.testing.assert_allclose(
                value.detach(), data["out_inputs_embeds"], **TOLERANCES["features_and_embeddings"]
            )
        else:
            np.testing.assert_array_equal(value, data[f"out_{name}"])
            assert value.numpy().dtype == data[f"out_{name}"].dtype


@pytest.mark.parametrize("case", cases("forward"))
def test_forward(case, configured):
    data, tensors, images = inputs_of(case)
    model = model_of(case)
    configured(model, case["config"])
    with torch.no_grad():
        out = model(
            input_ids=tensors["input_ids"],
            attention_mask=tensors.get("attention_mask"),
            labels=tensors.get("labels"),
            images=images,
            image_sizes=case["image_sizes"],
            output_hidden_states=True,
        )
    valid = data["valid"]
    assert out["logits"].shape[:2] == valid.shape
    picked = valid[:, data["positions"]]
    logits = out["logits"][:, data["positions"]].numpy()
    np.testing.assert_allclose(logits[picked], data["out_logits"][picked], **TOLERANCES["logits"])
    hidden = out["hidden_states"][-1][:, data["positions"]].numpy()
    np.testing.assert_allclose(hidden[picked], data["out_last_hidden"][picked], **TOLERANCES["logits"])
    np.testing.assert_array_equal(out["logits"].argmax(-1).numpy()[valid], data["out_argmax"][valid])
    np.testing.assert_allclose(
        out["logits"].logsumexp(-1).numpy()[valid], data["out_logsumexp"][valid], **TOLERANCES["logits"]
    )
    if case["loss"] is not None:
        assert out["loss"].item() == pytest.approx(case["loss"], abs=TOLERANCES["loss"]["atol"])


@pytest.mark.parametrize("case", cases("generate"))
def test_generate(case, configured):
    data, tensors, images = inputs_of(case)
    model = model_of(case)
    configured(model, case["config"])
    out = model.generate(
        tensors["input_ids"],
        images=images,
        image_sizes=case["image_sizes"],
        attention_mask=tensors.get("attention_mask"),
        return_dict_in_generate=True,
        output_scores=True,
        **case["generate_kwargs"],
    )
    assert out.sequences.tolist() == data["new_ids"].tolist()
    # Beams have no scores there, and a penalty counted the token that transformers 4.37 put in front.
    if not case["optional"]:
        np.testing.assert_allclose(out.scores[0], data["out_scores_first"], **TOLERANCES["logits"])


@pytest.mark.parametrize("case", cases("generate_raises"))
def test_generate_refuses_embeddings(case):
    with pytest.raises(NotImplementedError, match="`inputs_embeds` is not supported"):
        model_of(case).generate(inputs_embeds=torch.zeros(1, 4, 64))


def test_the_whole_manifest_is_covered():
    """A kind of golden data that no test reads would be silently lost."""
    here = {
        "load", "vision_features", "vision_in_checkpoint", "projector", "unpad_image", "prepare", "forward",
        "generate", "generate_raises",
    }  # fmt: skip
    elsewhere = {
        "conversation", "tokenizer_image_token", "model_name", "anyres", "pixels", "process_images", "keywords",
        "base64", "constants", "eval_model",
    }  # fmt: skip
    assert {case["kind"] for case in MANIFEST["cases"]} <= here | elsewhere
    assert Path(ROOT / "checkpoints").is_dir()
