"""Models whose weights accelerate keeps in another place than where they compute."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model

from golden import golden_root
from llava.model.builder import load_pretrained_model
from llava.model.offload import execution_device, parameter_here
from llava.pruning import available_methods, pruning
from tiny_llava import build, pixels, prompt
from tiny_methods import OPTIONS, RATIOS
from tiny_trained import trained_networks

CPU = torch.device("cpu")
CROPS = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
}


@pytest.fixture(scope="module")
def here(tower):
    """An anyres model."""
    return build(tower, **CROPS)


@pytest.fixture(scope="module")
def offloaded(tower, tmp_path_factory):
    """The same on "meta", its weights in files."""
    model = build(tower, **CROPS)
    disk_offload(model, tmp_path_factory.mktemp("weights"), CPU)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    return model


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return OPTIONS | trained_networks(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("method", ["none", *sorted(available_methods())])
def test_every_method_answers_as_with_its_weights_in_place(here, offloaded, options, method):
    answers = []
    for model in (here, offloaded):
        switch = nullcontext()
        if method != "none":
            switch = pruning(model, method, ratio=RATIOS.get(method, 0.3), **options.get(method, {}))
        with switch:
            ids = prompt(4, 6)[None].to(model.device)
            answers.append(model.generate(ids, images=pixels(1, 3), image_sizes=[(56, 112)], max_new_tokens=3).tolist())
    assert answers[0] == answers[1]


def test_inside_another_model_a_newline_is_found(tower, here):
    model = get_peft_model(build(tower, **CROPS), LoraConfig(r=2, target_modules=["o_proj"]))
    cpu_offload(model, CPU)
    inner = model.get_base_model()
    assert inner.device == execution_device(inner) == CPU
    assert torch.equal(parameter_here(inner.get_model(), "image_newline"), here.model.image_newline)


def test_a_value_that_nothing_keeps_is_named(tower):
    with pytest.raises(ValueError, match="image_newline is on the meta device, and nothing keeps its value"):
        parameter_here(build(tower, **CROPS).to("meta").get_model(), "image_newline")


class TestLoading:
    """`device_map` puts parts of a checkpoint on the disk."""

    @pytest.fixture(autouse=True)
    def golden_folder(self, monkeypatch):
        """Towers are named relative to it."""
        monkeypatch.chdir(golden_root() / "llava")

    @pytest.mark.parametrize("name", ["llava-v1.5-tiny", "llava-v1.6-vicuna-tiny"])
    def test_answers_are_those_of_the_whole_model(self, name, tmp_path):
        path = golden_root() / "llava" / "checkpoints" / name
        if not path.is_dir():
            pytest.skip(f"{name} is not part of the small golden copy")
        _, whole, _, _ = load_pretrained_model(str(path), None, name, device="cpu", dtype="float32")
        parts = ["layers", "vision_tower", "mm_projector", *(["image_newline"] if "1.6" in name else [])]
        places = {f"model.{part}": "disk" for part in parts}
        places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        _, model, _, _ = load_pretrained_model(
            str(path), None, name, device_map=places, offload_folder=tmp_path, dtype="float32"
        )
        assert model.model.mm_projector[0].weight.is_meta
        images = pixels(1, 3) if "1.6" in name else pixels(1)
        asked = {"images": images, "image_sizes": [(56, 112)], "max_new_tokens": 4, "do_sample": False}
        ids = prompt(4, 6)[None]
        assert model.generate(ids, **asked).tolist() == whole.generate(ids, **asked).tolist()

    def test_a_projector_that_would_be_offloaded_before_it_is_filled_is_named(self, tmp_path):
        folder, base = tmp_path / "part", golden_root() / "llava" / "checkpoints" / "llava-v1.5-tiny"
        folder.mkdir()
        (folder / "config.json").write_bytes((base / "config.json").read_bytes())
        _, whole, _, _ = load_pretrained_model(str(base), None, "x", device="cpu")
        weights = whole.model.mm_projector.state_dict(prefix="model.mm_projector.")
        torch.save(weights, folder / "mm_projector.bin")
        places = {"model": "disk", "lm_head": "cpu"}
        with pytest.raises(ValueError, match=r"mm_projector.* would be offloaded before it is filled: give max_memory"):
            load_pretrained_model(str(folder), str(base), "x", device_map=places, offload_folder=tmp_path)
