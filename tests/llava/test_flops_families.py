"""FLOPs of transformers' models: counted without weights, as PyTorch counts them with weights."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava import flops
from llava.adapters.transformers import FAMILIES, set_pruning
from llava.eval.flops.__main__ import main
from llava.flops.families import crops_seen, family_shape
from llava.flops.made_up import made_up_images, made_up_prompts
from llava.pruning import PruningConfig
from tiny_vlms import IMAGE, TINY, Picture, can_be_pruned, tiny

BEFORE, AFTER = [3] * 5, [4] * 7
# What linear attention (Qwen3.5) convolves beside its prompt; all others agree to the last FLOP.
MARGIN = 5e-3


def counted(function, **inputs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(**inputs)
    return counter.get_total_flops()


@can_be_pruned
@pytest.mark.parametrize("name", TINY)
def test_the_exact_count_is_that_of_torch(name):
    """Unpruned, pruned before the decoder and at a layer."""
    model = tiny(name).model
    if getattr(model.config.get_text_config(), "num_experts_per_tok", None):
        model = deepcopy(model)
        model.set_experts_implementation("eager")  # into fused products of experts PyTorch's counter does not see
    asked = made_up_prompts(model, [(BEFORE, AFTER)], [0], visual=16)
    visual = int((asked["input_ids"] == IMAGE).sum())
    shape = family_shape(model.config, visual)
    for config in (None, PruningConfig("uniform", 0.25), PruningConfig("uniform", 0.25, layer=2)):
        session = set_pruning(model, config)
        try:
            measured = counted(model, **asked, logits_to_keep=1)
            layers = [visual] * shape.decoder.layers if session is None else session.visual_tokens_per_layer[0]
        finally:
            set_pruning(model, None)
        tokens = flops.tokens_per_layer(len(BEFORE + AFTER), layers)
        assert flops.exact_flops(shape, tokens).total == pytest.approx(measured, rel=MARGIN)
        assert config is None or layers[-1] == round(0.25 * visual)


@pytest.mark.parametrize("name", ["internvl", "idefics3", "llava_onevision", "qwen2_vl"])
def test_every_crop_and_token_of_an_image_is_paid_for(name):
    model = tiny(name).model
    for size in (0, 1):
        pixels = tiny(name).pixels([[Picture(0, size)]])
        entries = model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
        total = sum(entry.numel() // entry.shape[-1] for entry in entries)
        shape = family_shape(model.config)
        crops = crops_seen(model.config, shape, [total], pixels.get("image_sizes"))
        nothing = [0] * shape.decoder.layers
        exact = flops.exact_flops(shape, nothing, crops=crops, logits=0).total
        assert exact == pytest.approx(counted(model.base_model.get_image_features, **pixels), rel=1e-3)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_made_up_image_is_the_same_every_time(family):
    config = tiny(family).model.config
    one, other, both = (made_up_images(config, numbers, visual=16) for numbers in ([3], [4], [3, 4]))
    for key, value in both.items():
        assert torch.equal(torch.cat([one[key], other[key]]), value)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_the_command_counts_a_folder_of_transformers(tmp_path, capsys):
    tiny("qwen2_5_vl").model.config.save_pretrained(tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--visual", "64", "--text", "10", "--method", "otprune"]
    assert main([*command, "--ratio", "0.25", "--json", str(tmp_path / "flops.json")]) == 0
    report = json.loads((tmp_path / "flops.json").read_text())
    assert report["tokens_per_layer"] == {"unpruned": [74] * 4, "pruned": [26] * 4}
    assert report["exact"]["total"]["ratio"] < 1 == report["exact"]["vision_tower"]["ratio"]
    assert "10 text and 64 visual tokens\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("qwen2_5_vl", ["--crops", "3"], "qwen2_5_vl models read an image whole, not in 3 crops"),
        ("gemma3", ["--visual", "99"], "an image of 1 crops has 16 visual tokens in this model, not 99"),
        ("llava_next", ["--crops", "9"], "an image of this model has 3, 4, 5 crops, not 9"),
    ],
)
def test_an_image_that_a_model_cannot_have_is_refused(tmp_path, capsys, name, options, sentence):
    tiny(name).model.config.save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_configuration_that_does_not_fit_is_refused(capsys):
    assert main(["--model", "gemma3"]) == 2  # by default its tower gives fewer patches than tokens are wanted
    assert "a gemma3 model of this configuration does not run: stride" in capsys.readouterr().err


def test_another_model_of_transformers_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mllama", "vision_config": {}}')
    assert main(["--model", str(tmp_path)]) == 2
    assert "is a 'mllama' model; supported: aya_vision" in capsys.readouterr().err


def test_a_published_shape_is_counted_without_a_checkpoint():
    shape = flops.load_shape("qwen2.5-vl-7b")
    assert (shape.decoder.layers, shape.decoder.hidden, shape.visual_tokens) == (28, 3584, 576)
    # 7.07e9 weights of the decoder's layers and head, 0.67e9 of the tower: twice as many FLOPs a token, or patch.
    weights = sum(cost.linear for cost in shape.decoder.costs) + shape.decoder.hidden * shape.decoder.vocabulary
    assert weights == pytest.approx(7.07e9, rel=0.01)


def test_llava_mini_is_the_same_decoder_in_both_formats():
    own, other = flops.load_shape("llava-mini"), flops.load_shape("llava-mini-hf")
    assert other.visual_tokens == own.visual_tokens
    tokens = [60 + own.visual_tokens] * own.decoder.layers
    own, other = (flops.exact_flops(shape, tokens) for shape in (own, other))
    assert (other.projector, other.decoder) == (own.projector, own.decoder)
