"""OC-VTP as a method: what its slots choose, in a model, with crops, and under the names that its users know."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from golden import golden_root
from llava.pruning import PruningConfig, VisualTokens, pruning
from llava.pruning.methods.ocvtp.pruner import claims, fill
from llava.pruning.methods.ocvtp.variables import translated
from tiny_llava import build, pad_rows, pixels, prompt
from tiny_ocvtp import save_pruner

FILE = golden_root() / "pruning" / "ocvtp.json"
META = json.loads(FILE.read_text()) if FILE.exists() else {}
STORED = np.load(FILE.with_suffix(".npz")) if FILE.exists() else {}
PROJECTIONS = ("encode_project.mlp.1.weight", "encode_project.mlp.4.weight", "aggregat.ffn.mlp.0.weight")
SELECTIONS = [pytest.param(case, id=case["key"].partition("/")[2]) for case in META.get("selection", [])]
TRIMMED = META.get("trim", [])


def golden_inputs(case):
    """Slot scores (S, 576), and the attention (4, 577, 577) of a golden case."""
    number, target, top_k = int(case["key"][len("select/case")]), case["effective_target"], case["top_k"]
    slots, draw = target // top_k, np.random.default_rng([META["base_seed"], 2, number])
    u, w, e = (draw.standard_normal(shape) for shape in ((slots, 6), (6, 576), (slots, 576)))
    scores = 0.3 * e
    for rank in range(6):
        scores = scores + u[:, rank, None] * w[rank]
    attention = np.random.default_rng([META["base_seed"], 3, number]).random((1, 4, 577, 577))
    found = []
    for array, name in ((scores, "sha_slot_scores"), (attention * attention * attention, "sha_attn")):
        array = np.ascontiguousarray(array, dtype=np.float32)
        assert name not in case or hashlib.sha256(array.tobytes()).hexdigest() == case[name]
        found.append(torch.from_numpy(array))
    return found[0], found[1][0]


@pytest.mark.parametrize("case", SELECTIONS)
def test_the_published_tokens_are_kept(case):
    scores, attention = golden_inputs(case)
    padding = {
        "meanq": attention.mean(dim=(0, 1))[1:],
        "cls": attention[:, 0].mean(dim=0)[1:],
    }[case["att_sel"]]
    claimed = claims(scores, case["top_k"])
    by_slots = (claimed > -torch.inf).nonzero().flatten() + 1
    assert [0, *by_slots.tolist()] == STORED[f"{case['key']}/after_slots"].tolist()
    # [CLS], which the published budget counts, is no patch.
    kept = fill(claimed, None if case["pad_mode"] == "None" else padding, case["effective_target"] - 1)
    assert [0, *(kept.sort().values + 1).tolist()] == STORED[f"{case['key']}/final_with_cls"].tolist()


@pytest.mark.parametrize("case", TRIMMED, ids=lambda case: f"target{case['target']}")
def test_of_too_many_claimed_tokens_the_least_claimed_goes(case):
    """The published code drops one in hash order; any one but [CLS] is sound."""
    places = torch.from_numpy(STORED[f"trim/case{case['case']}/slot_argmax"]).long()
    scores = torch.zeros(len(places), 576).scatter(1, places[:, None], torch.linspace(1, 2, len(places))[:, None])
    kept = fill(claims(scores, 1), torch.rand(576), case["target"] - 1)
    assert sorted(kept.tolist()) == sorted(places[1:].tolist())


def test_ties_go_to_the_lowest_index():
    assert claims(torch.ones(2, 4), 2).tolist() == [1, 1, -torch.inf, -torch.inf]
    assert fill(torch.full((4,), -torch.inf), torch.ones(4), 2).tolist() == [0, 1]


# ---- in a model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_pruner(tmp_path_factory.mktemp("pruner"))


def seen(model, config: PruningConfig, images, sizes=None):
    model.set_pruning(config)
    try:
        return model.image_tokens(images, sizes)
    finally:
        model.set_pruning(None)


def kept_of(model, config: PruningConfig, images, sizes=None) -> list[list[int]]:
    ids, mask = pad_rows([prompt(3, 5, seed=1)] * len(images))
    model.set_pruning(config)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, images=images, image_sizes=sizes)
        return [kept for _, kept in model.visual_token_counts]
    finally:
        model.set_pruning(None)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_the_network_reads_the_output_of_its_layer(model, tmp_path, layer):
    """Layers 0 and 1 run; what the encoder hands on is the output of the last one."""
    config = PruningConfig("ocvtp", 0.3, options={"checkpoint": save_pruner(tmp_path, layer=layer)})
    tower, images = model.get_vision_tower(), pixels(2)
    with torch.no_grad():
        found = torch.stack([image.signals["layer_features"] for image in seen(model, config, images)])
        torch.testing.assert_close(found, tower.layer_output(images, layer % 2))
        assert torch.equal(tower.layer_output(images, 1), tower(images)) and tower.depth == 2


@pytest.mark.parametrize("options", [{}, {"attention": "cls"}, {"pad": "random"}, {"top_k": 2}, {"has_cls": False}])
def test_a_picture_keeps_its_tokens_in_any_batch(model, checkpoint, options):
    config = PruningConfig("ocvtp", 0.4, options={"checkpoint": checkpoint, **options})
    rows, images = [prompt(3, 9, seed=1), prompt(6, 4, seed=2)], pixels(2)
    ids, mask = pad_rows(rows)
    with torch.no_grad(), pruning(model, "ocvtp", 0.4, checkpoint=checkpoint, **options):
        batch = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, images)[4]
        for row, own in enumerate(rows):
            alone = model.prepare_inputs_labels_for_multimodal(own[None], None, None, None, None, images[row : row + 1])
            assert torch.equal(batch[row, : alone[4].shape[1]], alone[4][0])
    assert kept_of(model, config, images) == [6, 6]


def test_the_network_decides(model, tmp_path):
    """Slots with another start claim other tokens, and nothing fills the budget."""
    images = pixels(1)
    options = {"checkpoint": save_pruner(tmp_path), "pad": "none"}
    found = []
    for seed in (0, 1):
        config = PruningConfig("ocvtp", 0.4, options=options | {"seed": seed})
        image = seen(model, config, images)[0]
        tokens = VisualTokens(image.features[None], 6, layer_features=image.signals["layer_features"][None])
        found.append(config.build_pruner().indices(tokens)[0].tolist())
        assert 1 <= len(found[-1]) <= 6
    assert found[0] != found[1]


def test_newlines_have_no_slot_and_go_last(anyres, checkpoint):
    sizes, images = [(84, 112)], [pixels(5, seed=2)]
    with torch.no_grad():
        config = PruningConfig("ocvtp", 0.3, options={"checkpoint": checkpoint})
        image = seen(anyres, config, images, sizes)[0]
        newline = torch.cat([part.is_newline() for part in image.layout])
        pruner = config.build_pruner()
        notes = {name: value[None] for name, value in image.signals.items()}
        for k in (5, 40, len(newline) - 3):
            tokens = VisualTokens(image.features[None], k, layout=image.layout, **notes)
            attention = pruner.slot_attention(tokens, 0, k)
            assert (attention[:, newline] == -torch.inf).all() and attention[:, ~newline].isfinite().all()
            assert len(attention) == min(k + 1, int((~newline).sum()))
            kept = pruner.indices(tokens)[0]
            assert int(newline[kept].sum()) == max(0, k - int((~newline).sum()))


@pytest.mark.parametrize(("target", "kept"), [(5, [5, 5]), (200, [52, 72])])
def test_a_target_is_a_number_of_tokens_whatever_the_image(anyres, checkpoint, target, kept):
    config = PruningConfig("ocvtp", options={"checkpoint": checkpoint, "target": target})
    assert kept_of(anyres, config, [pixels(3, seed=1), pixels(5, seed=2)], [(112, 56), (84, 112)]) == kept


def test_cls_among_the_visual_tokens_is_no_patch(tower, checkpoint):
    model = build(tower, mm_vision_select_feature="cls_patch")
    config = PruningConfig("ocvtp", 0.3, options={"checkpoint": checkpoint})
    with torch.no_grad():
        image = seen(model, config, pixels(1))[0]
    notes = {name: value[None] for name, value in image.signals.items()}
    kept = config.build_pruner().indices(VisualTokens(image.features[None], 16, **notes))[0]
    assert kept.tolist() == list(range(1, 17))


# ---- what does not fit


def test_a_pruner_for_another_vision_tower_is_refused_before_any_picture(model, tmp_path):
    folder = save_pruner(tmp_path, width=24)
    with pytest.raises(ValueError, match="reads features of width 24, but this vision tower's have 32"):
        model.set_pruning(PruningConfig("ocvtp", 0.3, options={"checkpoint": folder}))
    assert model.pruning is None


def test_a_layer_that_does_not_run_is_named(model, tmp_path):
    config = PruningConfig("ocvtp", 0.3, options={"checkpoint": save_pruner(tmp_path, layer=8)})
    with pytest.raises(ValueError, match="asks for layer 8 of the vision encoder, of which 2 layers run"):
        seen(model, config, pixels(1))


@pytest.mark.parametrize(
    ("ratio", "options", "said"),
    [
        (None, {}, "a kept ratio is needed"),
        (0.3, {"target": 5}, "target=5 sets how many tokens are kept: leave out the kept ratio"),
        (None, {"target": 5, "per_crop": True}, "target=5 is for a whole image"),
        (None, {"target": 0}, "target must be a whole number >= 1, not 0"),
        (0.3, {"top_k": 0}, "top_k must be a whole number >= 1, not 0"),
        (0.3, {"attention": "cls", "has_cls": False}, "needs a .CLS. token: has_cls must be 1"),
        (0.3, {"encoder_layer": 1}, "was trained on layer 0 .* not 1"),
        (0.3, {"pad": "zeros"}, "attention or random or none"),
        (0.3, {"checkpoint": "/nowhere/pruner"}, "There is no pruner /nowhere/pruner"),
    ],
)
def test_options_that_do_not_go_together_are_named(checkpoint, ratio, options, said):
    with pytest.raises(ValueError, match=said):
        PruningConfig("ocvtp", ratio, options={"checkpoint": checkpoint} | options)


def test_a_target_stays_before_the_decoder(checkpoint):
    with pytest.raises(ValueError, match=r"LAYER_INDEX.* must be 0 or left out, not 2"):
        PruningConfig("ocvtp", layer=2, options={"checkpoint": checkpoint, "target": 5})


def test_results_of_a_retrained_pruner_are_told_apart(tmp_path):
    config = PruningConfig("ocvtp", 0.3, options={"checkpoint": save_pruner(tmp_path)})
    before = config.fingerprint()
    assert config.to_dict()["files"] == config.build_pruner().digests()
    save_pruner(tmp_path, iterations=2)
    assert config.fingerprint() != before


# ---- the variables of OC-VTP's users


def test_the_published_variables_say_the_same(checkpoint):
    environ = {
        "OCL_ENABLE": "1",
        "OCL_MODE": "pruning",
        "OCL_LAYER_IDX": "0",
        "OCL_CKPT": checkpoint,
        "OCL_TARGET_NUM": "128",
        "OCL_TOPK": "2",
        "OCL_HAS_CLS": "1",
        "OCL_PAD_MODE": "att_score",
        "OCL_ATTSEL": "cls",
        "PATH": "/bin",
    }
    config = PruningConfig.from_env(environ)
    expected = {"checkpoint": checkpoint, "encoder_layer": 0, "target": 128, "top_k": 2, "has_cls": True}
    assert config.method == "ocvtp" and config.ratio is None
    assert dict(config.options) == expected | {"pad": "attention", "attention": "cls"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"OCVTP_TARGET": "64"}),
        ({"OCL_PAD_MODE": "None"}, {"OCVTP_TARGET": "64", "OCVTP_PAD": "none"}),
        ({"OCL_PAD_MODE": "random", "OCL_ATTSEL": "meanq"}, {"OCVTP_PAD": "random", "OCVTP_ATTENTION": "mean"}),
        ({"OCL_HAS_CLS": "0", "OCL_CONFIG": "a.json"}, {"OCVTP_HAS_CLS": "0", "OCVTP_CONFIG": "a.json"}),
        # the published code cannot look at attention there
        ({"OCL_LAYER_IDX": "-2"}, {"OCVTP_ENCODER_LAYER": "-1", "OCVTP_PAD": "random"}),
    ],
)
def test_what_is_left_out_has_the_published_default(given, expected):
    found = translated({"OCL_ENABLE": "1", **given})
    assert found == {"BASELINE": "OCVTP", "OCVTP_TARGET": "64"} | expected


def test_switched_off_they_mean_nothing():
    assert PruningConfig.from_env({"OCL_ENABLE": "0", "OCL_CKPT": "/nowhere"}) is None
    environ = {"OCL_ENABLE": "0", "OCL_TOPK": "3", "BASELINE": "RANDOM", "SUBSET_RATIO": "0.5"}
    assert PruningConfig.from_env(environ).method == "random"
    assert translated({"HOME": "/x"}) == {"HOME": "/x"}
    assert PruningConfig.from_env({"OCL_ENABLE": "", "OCL_CKPT": ""}) is None


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"OCL_CKPT": "x"}, "OCL_CKPT=x is set but OCL_ENABLE is not"),
        ({"OCL_ENABLE": "yes"}, "OCL_ENABLE=yes: must be 1 or true or 0 or false"),
        ({"OCL_ENABLE": "1", "BASELINE": "OURS"}, "BASELINE=OURS is set beside OCL_ENABLE=1"),
        ({"OCL_ENABLE": "1", "OCVTP_TOP_K": "1"}, "OCVTP_TOP_K=1 is set beside OCL_ENABLE=1"),
        ({"OCL_ENABLE": "1", "OCL_MODE": "merging"}, "OCL_MODE=merging: must be pruning"),
        ({"OCL_ENABLE": "1", "OCL_TOPK": "1_0"}, "OCL_TOPK=1_0: must be a whole number >= 1"),
        ({"OCL_ENABLE": "1", "OCL_TARGET_NUM": "all"}, "OCL_TARGET_NUM=all: must be a whole number >= 1"),
        ({"OCL_ENABLE": "1", "OCL_PAD_MODE": "zero"}, "OCL_PAD_MODE=zero: must be att_score or random or none"),
        ({"OCL_ENABLE": "1", "OCL_LAYER_IDX": "-3"}, "OCL_LAYER_IDX=-3: must be a layer"),
        ({"OCL_ENABLE": "1", "OCL_LAYER_IDX": "\u0663"}, "OCL_LAYER_IDX=\u0663: must be a layer"),
        ({"OCL_ENABLE": "1", "OCL_LAYER_IDX": "8"}, "^OCL_LAYER_IDX=8: .* was trained on layer 2 .* not 8"),
        (
            {"OCL_ENABLE": "1", "OCL_ATTSEL": "cls", "OCL_HAS_CLS": "0"},
            "^OCL_ATTSEL=cls OCL_HAS_CLS=0: .* has_cls must be 1",
        ),
        ({"OCL_ENABLE": "1", "OCL_CKPT": "/no/best.pth"}, "^OCL_CKPT=/no/best.pth: .*There is no pruner /no/best.pth$"),
        ({"OCL_ENABLE": "1", "OCL_CONFIG": "/no/sizes.json"}, "leave out /no/sizes.json"),
        ({"OCL_ENABLE": "1", "OCL_COLOUR": "red"}, "OCL_COLOUR=red: OC-VTP has no such variable"),
    ],
)
def test_a_wrong_variable_is_named(environ, said):
    with pytest.raises(ValueError, match=said):
        PruningConfig.from_env(environ)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("sizes.json", None, "There is no .*sizes.json"),
        ("sizes.json", "{", "sizes.json is not valid JSON or YAML"),
        ("sizes.yaml", "a: [", "sizes.yaml is not valid JSON or YAML"),
        ("sizes.yaml", "- a", "sizes.yaml does not hold the settings of an OC-VTP pruner"),
    ],
)
def test_a_published_configuration_that_cannot_be_read_is_named(tmp_path, name, content, said):
    torch.save({key: torch.zeros(2, 2) for key in PROJECTIONS}, tmp_path / "best.pth")
    if content is not None:
        (tmp_path / name).write_text(content)
    environ = {"OCL_ENABLE": "1", "OCL_CKPT": str(tmp_path / "best.pth"), "OCL_CONFIG": str(tmp_path / name)}
    with pytest.raises(ValueError, match=rf"^OCL_CKPT=.*best.pth OCL_CONFIG=.*{name}: .*{said}") as caught:
        PruningConfig.from_env(environ)
    assert len(str(caught.value).splitlines()) == 1
