"""OC-VTP's network and loss: the published values and gradients, and both formats of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from golden import golden_root
from llava.fitting.ocvtp.objective import (
    DecoderConfig,
    Draws,
    RandomOrderDecoder,
    seeded,
    slot_weights,
    weighted_error,
)
from llava.fitting.ocvtp.train import save_pruner as save
from llava.pruning import PruningConfig, VisualTokens
from llava.pruning.methods.ocvtp.checkpoint import PrunerFiles
from llava.pruning.methods.ocvtp.network import SlotConfig, SlotPruner, slot_noise
from llava.pruning.methods.ocvtp.published import PRUNER_NAMES, load_published, renamed
from tiny_ocvtp import save_pruner, tiny_config, tiny_pruner

FILE = golden_root() / "pruning" / "ocvtp.json"
META = json.loads(FILE.read_text()) if FILE.exists() else {}
STORED = np.load(FILE.with_suffix(".npz")) if FILE.exists() else {}
TINY = ["tiny"] if "tiny/features" in STORED else []
LOSSES = [
    case
    for case in META.get("loss", [])
    if case["reduce_channel"] == "mean"
    and "loss/pred" in STORED
    # The published mean counts an empty slot, and the cap then cuts another weight.
    and not (case["alpha"] == "alpha_with_empty_slot" and case["cap_w"] == 1.2)
]
DECODER_NAMES = {
    "decode.mask_token": "mask_token",
    "decode.posit_embed._pe": "positions",
    "decode.project1.project.": "token_projection.0.",
    "decode.project1.norm.": "token_projection.1.",
    "decode.project2.project.": "slot_projection.0.",
    "decode.project2.norm.": "slot_projection.1.",
    "decode.norm0.": "norm.",
    "decode.backbone.layers.": "layers.",
}
"""The published code's names of the decoder's weights, as they begin, and ours."""
# A sum of a few hundred float32 products near 1, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def stored(name: str) -> torch.Tensor:
    return torch.from_numpy(STORED[name])


def under(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): stored(name) for name in STORED if name.startswith(prefix)}


def golden_pruner(**overrides) -> SlotPruner:
    config = SlotConfig(width=24, hidden=32, slot_width=16, feed_forward=64, slots=5, **{"dropout": 0.0} | overrides)
    return SlotPruner.from_weights(config, renamed(under("tiny/state_dict/"), PRUNER_NAMES), "golden")


def golden_decoder() -> RandomOrderDecoder:
    decoder = RandomOrderDecoder(16, DecoderConfig(tokens=36, width=24, heads=4, layers=2, feed_forward=48))
    decoder.load_state_dict(renamed(under("tiny/state_dict/"), DECODER_NAMES))
    return decoder


# ---- published values


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", TINY)
def test_slots_are_the_published_ones(kind, iterations):
    slots, attention = golden_pruner(iterations=iterations)(stored("tiny/features"), stored("tiny/init_noise"))
    torch.testing.assert_close(slots, stored(f"tiny/eval/iter{iterations}/slots"), **CLOSE)
    torch.testing.assert_close(attention, stored(f"tiny/eval/iter{iterations}/slot_attn"), **CLOSE)


@pytest.mark.parametrize("kind", TINY)
def test_the_decoder_reconstructs_what_the_published_one_does(kind):
    features, slots = stored("tiny/features"), stored("tiny/eval/slots")
    everything = torch.full((2, 1), 36)
    found = golden_decoder()(features, slots, torch.arange(36).expand(2, -1), everything)
    torch.testing.assert_close(found, stored("tiny/eval/recon"), **CLOSE)


@pytest.mark.parametrize(("gradient", "bi_level"), [("bi-level", True), ("None", False)])
@pytest.mark.parametrize("kind", TINY)
def test_a_training_step_has_the_published_gradients(kind, gradient, bi_level):
    pruner, decoder = golden_pruner(bi_level=bi_level).train(), golden_decoder()
    features = stored("tiny/features")
    shown = torch.where(stored("tiny/train/rand_u") < 0.5, stored("tiny/train/keep1"), 24)
    slots, attention = pruner(features, stored("tiny/init_noise"))
    found = decoder(features, slots, stored("tiny/train/perm"), shown)
    torch.testing.assert_close(found, stored(f"tiny/train/{gradient}/recon"), **CLOSE)
    loss = weighted_error(found, features, attention, published_weights(attention.detach())).mean()
    assert loss.item() == pytest.approx(float(STORED[f"tiny/train/{gradient}/loss"]), rel=1e-5)
    loss.backward()
    published = under(f"tiny/train/{gradient}/grad/")
    expected = renamed(published, PRUNER_NAMES) | renamed(published, DECODER_NAMES)
    own = dict(pruner.named_parameters()) | dict(decoder.named_parameters())
    assert set(expected) == set(own)
    for name, value in expected.items():
        torch.testing.assert_close(own[name].grad, value, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def published_weights(attention: torch.Tensor) -> torch.Tensor:
    """With the published weight of slots that win no token, 1e4 before it is normalised."""
    area = torch.nn.functional.one_hot(attention.argmax(1), attention.shape[1]).float().mean(1)
    weights = area.clamp_min(1e-8) ** -0.5
    return (weights / weights.mean(dim=-1, keepdim=True)).clamp_max(10)


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: "{alpha}-{norm_mode}-{cap_w}-{power_p}".format(**case))
def test_the_loss_is_the_published_one(case):
    attention = stored(f"loss/{case['alpha']}")
    normalise = {"mean1": "mean", "sum1": "sum", "none": "none"}[case["norm_mode"]]
    weights = slot_weights(attention, case["power_p"], normalise, case["cap_w"])
    found = weighted_error(stored("loss/pred"), stored("loss/target"), attention, weights)
    assert found.tolist() == pytest.approx(case["per_image"], rel=1e-5)


# ---- what they mean


def test_an_empty_slot_has_no_say_in_the_loss():
    draw = torch.Generator().manual_seed(3)
    attention = torch.rand(1, 3, 20, generator=draw).softmax(dim=1)
    target, found = torch.randn(2, 1, 20, 4, generator=draw)
    # A fourth slot takes a little of every token and wins none.
    faint = torch.cat([0.9 * attention, torch.full((1, 1, 20), 0.1)], dim=1)
    weights = slot_weights(faint)
    assert weights[0, 3] == 0
    torch.testing.assert_close(weights[:, :3], slot_weights(attention))
    torch.testing.assert_close(
        weighted_error(found, target, faint, weights),
        weighted_error(found, target, attention, slot_weights(attention)),
    )


def test_bi_level_gradients_see_one_iteration_only():
    """The initial slots get the gradient of the last iteration at its own input, as if it were their own."""
    pruner = tiny_pruner(iterations=3)
    tokens = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(1))
    initial = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    pruner.attention(tokens, initial)[0].square().sum().backward()

    pruner.attention.iterations = 2
    last_input = pruner.attention(tokens, initial.detach())[0].detach().requires_grad_()
    pruner.attention.iterations = 1
    pruner.attention(tokens, last_input)[0].square().sum().backward()
    # The straight-through value a + b - b is a but for its last digits.
    torch.testing.assert_close(initial.grad, last_input.grad, rtol=1e-4, atol=1e-4)


def test_tokens_that_are_not_visible_are_as_if_not_there():
    pruner, noise = tiny_pruner(), slot_noise(0, 4, 16)
    features = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(4))
    visible = torch.arange(12)[None] % 3 > 0
    slots, attention = pruner(features, noise, visible)
    expected, own = pruner(features[:, visible[0]], noise)
    torch.testing.assert_close(slots, expected)
    torch.testing.assert_close(attention[:, :, visible[0]], own)
    assert not attention[:, :, ~visible[0]].any()


def test_the_decoder_sees_the_shown_tokens_and_no_others():
    torch.manual_seed(0)
    config = tiny_config()
    decoder = RandomOrderDecoder(config.slot_width, DecoderConfig(**config.decoder))
    draws = Draws.sample(seeded("x"), 1, 4, config)
    features, slots = torch.randn(1, 16, 32), torch.randn(1, 4, 16)
    shown = torch.full((1, 1), 5)
    seen = draws.order[0, :5]
    before = decoder(features, slots, draws.order, shown)
    hidden = features.clone()
    hidden[0, draws.order[0, 5:]] = 7
    assert torch.equal(decoder(hidden, slots, draws.order, shown), before)
    hidden[0, seen[0]] = 7
    assert not torch.equal(decoder(hidden, slots, draws.order, shown), before)


# ---- on the disk


def test_a_saved_pruner_is_the_same_when_loaded(tmp_path):
    pruner = tiny_pruner(trained_on={"model": "x", "count": 3})
    save(pruner, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = SlotPruner.from_pretrained(tmp_path)
    assert loaded.config == pruner.config and not loaded.training
    features, noise = torch.randn(1, 9, 32), slot_noise(0, 4, 16)
    assert torch.equal(loaded(features, noise)[1], pruner(features, noise)[1])


def published_weights_file(folder, pruner, extra=()):
    """A checkpoint as the published code saves it, with the decoder that it was trained with."""
    weights = {}
    for name, value in pruner.state_dict().items():
        prefix = next(own for own in PRUNER_NAMES.values() if name.startswith(own))
        published = next(key for key, own in PRUNER_NAMES.items() if own == prefix)
        weights[f"module.{published}{name.removeprefix(prefix)}"] = value
    file = folder / "best.pth"
    torch.save(weights | {"module.decode.mask_token": torch.zeros(1, 1, 8), **dict(extra)}, file)
    return file


PUBLISHED_SIZES = {"enc_in_dim": 32, "enc_dims": [24, 16], "enc_ln": "pre", "agg_num_iter": 2, "agg_ffn_dim": 24}


@pytest.mark.parametrize("sizes_file", ["sizes.json", "sizes.yaml", None])
def test_a_published_checkpoint_loads_without_its_decoder(tmp_path, sizes_file):
    pruner = tiny_pruner()
    file, sizes = published_weights_file(tmp_path, pruner), sizes_file and tmp_path / sizes_file
    if sizes is not None:
        # What is JSON is YAML.
        sizes.write_text(json.dumps(PUBLISHED_SIZES | {"init_num": 7, "backbone_nlayer": 4}))
    loaded = load_published(file, sizes)
    # Nothing but the configuration file knows the iterations.
    assert loaded.config.iterations == (3 if sizes is None else 2)
    pruner.attention.iterations = loaded.config.iterations
    features, noise = torch.randn(1, 9, 32), slot_noise(0, 4, 16)
    assert torch.equal(loaded(features, noise)[0], pruner(features, noise)[0])
    files = PrunerFiles.find(str(file), sizes and str(sizes))
    assert files.config.layer == 8 and files.config.width == 32


"""The published pruner for LLaVA-1.5 and LLaVA-NeXT; what differs between them is in the decoder."""


@pytest.mark.parametrize(
    ("wrapper", "file_holds"),
    [("", "weights"), ("module.", "state_dict"), ("model.", "model"), ("model._orig_mod.", "weights")],
)
def test_a_pruner_that_was_saved_inside_another_module_loads(tmp_path, wrapper, file_holds):
    pruner = tiny_pruner()
    weights = torch.load(published_weights_file(tmp_path, pruner))
    weights = {name.replace("module.", wrapper, 1): value for name, value in weights.items()}
    torch.save(weights if file_holds == "weights" else {file_holds: weights, "epoch": 3}, tmp_path / "best.pth")
    loaded = load_published(tmp_path / "best.pth").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in pruner.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"enc_in_dim": "32"}, "sizes.json: enc_in_dim must be a whole number >= 1, not '32'"),
        ({"enc_dims": 5}, "sizes.json: enc_dims must be the widths of two layers, not 5"),
        ({"enc_dims": [24, 0]}, "sizes.json: enc_dims must be a whole number >= 1, not 0"),
        ({"agg_num_iter": 0}, "sizes.json: agg_num_iter must be a whole number >= 1, not 0"),
        ({"enc_in_dim": 1024}, "states width 1024, but the weights in .* have 32"),
        ({"enc_ln": "post"}, "enc_ln must be 'pre'.*not 'post'"),
    ],
)
def test_a_published_configuration_that_does_not_fit_is_named(tmp_path, change, said):
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(PUBLISHED_SIZES | change))
    with pytest.raises(ValueError, match=said):
        load_published(published_weights_file(tmp_path, tiny_pruner()), sizes)


def test_files_that_are_no_pruner_are_named(tmp_path):
    with pytest.raises(OSError, match=r"nowhere is not an OC-VTP pruner: it has no config.json"):
        SlotPruner.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(OSError, match=r"Cannot read .*text.pth"):
        load_published(tmp_path / "text.pth")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match=r"numbers.pth holds no state dict"):
        load_published(tmp_path / "numbers.pth")
    flat = {"encode_project.mlp.1.weight": torch.zeros(3), "encode_project.mlp.4.weight": 3}
    torch.save(flat | {"aggregat.ffn.mlp.0.weight": torch.zeros(2, 2)}, tmp_path / "flat.pth")
    with pytest.raises(ValueError, match=r"flat.pth is no OC-VTP pruner: its weights have other shapes"):
        load_published(tmp_path / "flat.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth is no OC-VTP pruner: it has no weights 'project"):
        load_published(tmp_path / "other.pth")
    with pytest.raises(OSError, match=r"There is no pruner .*missing"):
        PrunerFiles.find(str(tmp_path / "missing"))
    folder = save_pruner(tmp_path / "own")
    with pytest.raises(ValueError, match=r"has a config.json of its own: leave out other.json"):
        PrunerFiles.find(folder, "other.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ('{"model_type": "llava"}', "does not describe an OC-VTP pruner"),
        ('{"model_type": "ocvtp", "colour": 1}', "does not describe an OC-VTP pruner: .*colour"),
        ('{"model_type": "ocvtp", "width": 0}', "width of a pruner must be a whole number >= 1, not 0"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        SlotConfig.load(tmp_path)


def test_weights_of_other_sizes_are_refused(tmp_path):
    folder = save_pruner(tmp_path)
    save(SlotPruner(dataclasses.replace(tiny_config(), slot_width=8)), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", folder)
    with pytest.raises(
        ValueError, match=r"model.safetensors does not hold the weights of this network: .*size mismatch"
    ):
        SlotPruner.from_pretrained(folder)


def test_features_of_another_width_and_too_many_slots_are_refused():
    with pytest.raises(ValueError, match="reads features of width 32, not 8"):
        tiny_pruner()(torch.zeros(1, 9, 8), slot_noise(0, 4, 16))
    with pytest.raises(ValueError, match="10 slots are more than the 9 tokens"):
        tiny_pruner()(torch.zeros(1, 9, 32), slot_noise(0, 10, 16))


def test_a_pruner_that_is_trained_on_is_read_anew(tmp_path):
    files = PrunerFiles.find(save_pruner(tmp_path))
    before = files.digest
    assert files.network("cpu") is files.network("cpu")
    changed = tiny_pruner()
    with torch.no_grad():
        changed.initial.mean.add_(1)
    save(changed, tmp_path, torch.bfloat16)
    assert files.digest != before
    assert torch.equal(files.network("cpu").initial.mean, changed.initial.mean.bfloat16().float())


CLIP_L = {
    "encode_project.mlp.0.weight": (1024,),
    "encode_project.mlp.0.bias": (1024,),
    "encode_project.mlp.1.weight": (2048, 1024),
    "encode_project.mlp.1.bias": (2048,),
    "encode_project.mlp.4.weight": (512, 2048),
    "encode_project.mlp.4.bias": (512,),
    "initializ.mean": (1, 1, 512),
    "initializ.logstd": (1, 1, 512),
    **{f"aggregat.norm_{name}.{part}": (512,) for name in ("in", "slots_0", "slots_1") for part in ("weight", "bias")},
    **{f"aggregat.proj_{name}.weight": (512, 512) for name in "qkv"},
    **{f"aggregat.gru.weight_{name}": (1536, 512) for name in ("ih", "hh")},
    **{f"aggregat.gru.bias_{name}": (1536,) for name in ("ih", "hh")},
    "aggregat.ffn.mlp.0.weight": (2048, 512),
    "aggregat.ffn.mlp.0.bias": (2048,),
    "aggregat.ffn.mlp.3.weight": (512, 2048),
    "aggregat.ffn.mlp.3.bias": (512,),
}

CLIP_L_DECODER = {
    "decode.mask_token": (1, 1, 1024),
    "decode.project1.project.weight": (1024, 1024),
    "decode.project2.project.weight": (1024, 512),
    "decode.norm0.weight": (1024,),
    "decode.backbone.layers.3.linear1.weight": (4096, 1024),
}

CLIP_L_SIZES = """\
enc_in_dim: 1024
enc_dims: [2048, 512]
enc_ln: pre
agg_num_iter: 3
agg_embed_dim: 512
agg_ffn_dim: 2048
agg_trunc_bp: bi-level
"""


@pytest.mark.parametrize(
    ("tokens", "kept", "with_sizes"),
    [(576, 64, False), (576, 64, True), (2880, 160, False)],
    ids=["1.5", "sizes", "next"],
)
def test_a_published_pruner_for_clip_l_chooses_tokens(tmp_path, tokens, kept, with_sizes):
    draw = torch.Generator().manual_seed(5)
    weights = {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in CLIP_L.items()}
    decoder = CLIP_L_DECODER | {"decode.posit_embed._pe": (1, tokens, 1024)}
    weights |= {name: torch.zeros(()).expand(shape) for name, shape in decoder.items()}
    torch.save(weights, tmp_path / "best.pth")
    environ = {"OCL_ENABLE": "1", "OCL_CKPT": str(tmp_path / "best.pth"), "OCL_TARGET_NUM": str(kept)}
    if with_sizes:
        (tmp_path / "sizes.yml").write_text(CLIP_L_SIZES)
        environ["OCL_CONFIG"] = str(tmp_path / "sizes.yml")
    pruner = PruningConfig.from_env(environ).build_pruner()
    assert pruner.feature_layer == 8
    pruner.check_model(None, 1024)
    found = pruner.indices(
        VisualTokens(
            torch.zeros(1, tokens, 4),
            tokens,
            layer_features=torch.randn(1, tokens, 1024, generator=draw),
            received_attention=torch.rand(1, tokens, 1, generator=draw),
        )
    )
    assert found.shape == (1, kept) and found.unique().numel() == kept
