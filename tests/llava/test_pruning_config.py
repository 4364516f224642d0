"""The switch: what it accepts, and the sentence it answers with otherwise."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re

import pytest

from llava.pruning import PruningConfig, available_methods, kept_count, register
from llava.pruning.options import alternatives, option_types
from llava.pruning.registry import method_class
from tiny_llava import build

ON = {"BASELINE": "OURS", "SUBSET_RATIO": "0.098"}


@pytest.mark.parametrize("environ", [{}, {"BASELINE": ""}, {"BASELINE": "ORIG"}, {"BASELINE": "orig"}])
def test_the_switch_is_off(environ):
    assert PruningConfig.from_env(environ) is None


def test_orig_ignores_the_rest_of_the_switch():
    assert PruningConfig.from_env({"BASELINE": "ORIG", "SUBSET_RATIO": "0.1", "LAYER_INDEX": "0"}) is None


@pytest.mark.parametrize("name", ["OURS", "ours", "OTPRUNE", "OtPrune"])
def test_ours_is_otprune_in_any_case(name):
    config = PruningConfig.from_env({"BASELINE": name, "SUBSET_RATIO": "0.098"})
    assert (config.method, config.ratio, config.layer) == ("otprune", 0.098, 0)


def test_a_method_inside_the_decoder_has_a_layer_of_its_own():
    assert PruningConfig.from_env({"BASELINE": "FASTV", "SUBSET_RATIO": "0.5"}).layer == 2
    assert PruningConfig.from_env({"BASELINE": "FASTV", "SUBSET_RATIO": "0.5", "LAYER_INDEX": "3"}).layer == 3


def test_layer_and_options_are_read():
    config = PruningConfig.from_env(ON | {"LAYER_INDEX": "3", "OTPRUNE_GAMMA": "0.5", "OTPRUNE_COMPAT": "1"})
    assert config.layer == 3 and dict(config.options) == {"gamma": 0.5, "compat": True}
    assert config.build_pruner().gamma == 0.5


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"BASELINE": "NOPE", "SUBSET_RATIO": "0.1"}, r"BASELINE=NOPE.*available: .*otprune.*ORIG"),
        ({"BASELINE": "OURS"}, r"BASELINE=OURS: .*SUBSET_RATIO"),
        ({"SUBSET_RATIO": "0.1"}, r"SUBSET_RATIO=0.1 is set but BASELINE is not"),
        ({"LAYER_INDEX": "0"}, r"LAYER_INDEX=0 is set but BASELINE is not"),
        (ON | {"SUBSET_RATIO": "0"}, r"SUBSET_RATIO=0: .*0 < r <= 1"),
        (ON | {"SUBSET_RATIO": "1.5"}, r"SUBSET_RATIO=1.5: .*0 < r <= 1"),
        (ON | {"SUBSET_RATIO": "-0.1"}, r"SUBSET_RATIO=-0.1: .*0 < r <= 1"),
        (ON | {"SUBSET_RATIO": "abc"}, r"SUBSET_RATIO=abc: .*number"),
        (ON | {"SUBSET_RATIO": "nan"}, r"SUBSET_RATIO=nan: .*number"),
        (ON | {"LAYER_INDEX": "-1"}, r"LAYER_INDEX=-1: .*0 <= L"),
        (ON | {"LAYER_INDEX": "x"}, r"LAYER_INDEX=x: .*whole number"),
        (ON | {"LAYER_INDEX": "1.5"}, r"LAYER_INDEX=1.5: .*whole number"),
        (ON | {"LAYER_INDEX": "1_0"}, r"LAYER_INDEX=1_0: .*whole number"),
        (ON | {"LAYER_INDEX": "٣"}, r"LAYER_INDEX=٣: .*whole number"),
        (ON | {"SUBSET_RATIO": "0.1_0"}, r"SUBSET_RATIO=0.1_0: .*number"),
        (ON | {"OTPRUNE_GAMA": "1"}, r"OTPRUNE_GAMA=1: .*OTPRUNE_GAMMA, OTPRUNE_COMPAT"),
        (ON | {"OURS_GAMMA": "1"}, r"OURS_GAMMA=1: OURS is otprune, whose options are named OTPRUNE_"),
        (ON | {"OTPRUNE_GAMMA": "much"}, r"OTPRUNE_GAMMA=much: must be a number"),
        (ON | {"OTPRUNE_GAMMA": "-1"}, r"^OTPRUNE_GAMMA=-1: OTPrune's gamma must be a finite number > 0, not -1"),
        (ON | {"OTPRUNE_COMPAT": "perhaps"}, r"OTPRUNE_COMPAT=perhaps: must be 1 or 0"),
        ({"BASELINE": "RANDOM", "SUBSET_RATIO": "0.1", "RANDOM_SEED": "0.5"}, r"RANDOM_SEED=0.5: .*whole number"),
        ({"BASELINE": "FASTV", "SUBSET_RATIO": "0.1", "LAYER_INDEX": "0"}, r"fastv works inside.*at least 1.*not 0"),
        (
            {"BASELINE": "FIRST_K", "SUBSET_RATIO": "0.1", "FIRST_K_X": "1"},
            r"FIRST_K_X=1: .*knows FIRST_K_POSITION_IDS",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_wrong_value_is_named_with_what_is_allowed(environ, said):
    with pytest.raises(ValueError, match=said):
        PruningConfig.from_env(environ)


OUT_OF_RANGE = {
    "otprune_gamma": "nan",
    "hiprune_alpha": "1.5",
    "hiprune_object_layer": "0",
    "visionzip_contextual_share": "-0.1",
    "vispruner_important_ratio": "2",
    "fitprune_recipe": "nowhere.json",
    "fitprune_reduction_ratio": "1",
    "fitprune_samples": "0",
    "ocvtp_checkpoint": "nowhere",
    "ocvtp_config": "nowhere.py",
    "ocvtp_encoder_layer": "1",
    "ocvtp_target": "0",
    "ocvtp_top_k": "0",
}
"""What no method can start with; of switches, names and seeds every value of their type is allowed."""


def every_option() -> list[tuple[str, str]]:
    kinds = {bool: "2", int: "x", float: "x"}
    found = []
    for method in available_methods():
        for option, kind in option_types(method_class(method)).items():
            wrong = next((text for accepted, text in kinds.items() if accepted in alternatives(kind)), "nonsense")
            found += [(method, f"{method}_{option}".upper(), wrong)] if str not in alternatives(kind) else []
            if (text := OUT_OF_RANGE.get(f"{method}_{option}")) is not None:
                found.append((method, f"{method}_{option}".upper(), text))
    return found


@pytest.mark.parametrize(("method", "variable", "text"), every_option(), ids=lambda value: str(value))
def test_a_wrong_option_is_named_as_it_was_typed(method, variable, text):
    ratio = {} if variable.startswith("FITPRUNE_RE") else {"SUBSET_RATIO": "0.5"}
    with pytest.raises(ValueError, match=rf"^{variable}={text}: "):
        PruningConfig.from_env({"BASELINE": method, "VISPRUNER_PER_CROP": "1", **ratio, variable: text})


@pytest.mark.parametrize(
    ("environ", "begins"),
    [
        (
            {"BASELINE": "OCVTP", "SUBSET_RATIO": "0.5", "OCVTP_TARGET": "64", "OCVTP_SEED": "1"},
            "SUBSET_RATIO=0.5 OCVTP_TARGET=64",
        ),
        ({"BASELINE": "OCVTP", "OCVTP_TARGET": "64", "OCVTP_PER_CROP": "1"}, "OCVTP_PER_CROP=1: "),
        ({"BASELINE": "PRUMERGE", "PRUMERGE_ADAPTIVE": "1", "LAYER_INDEX": "2"}, "LAYER_INDEX=2: "),
        ({"BASELINE": "SPARSEVLM", "SPARSEVLM_SCHEDULE": "64", "SUBSET_RATIO": "0.5"}, "SUBSET_RATIO=0.5"),
        ({"BASELINE": "FASTV", "SUBSET_RATIO": "0.5", "LAYER_INDEX": "0"}, "LAYER_INDEX=0"),
        ({"BASELINE": "VTW", "SUBSET_RATIO": "0.5", "LAYER_INDEX": "2"}, "SUBSET_RATIO=0.5 LAYER_INDEX=2"),
        ({"BASELINE": "FITPRUNE", "SUBSET_RATIO": "0.5", "FITPRUNE_SCALE": "1"}, "FITPRUNE_SCALE=1"),
        ({"OCL_ENABLE": "1", "OCL_ATTSEL": "cls", "OCL_HAS_CLS": "0"}, "OCL_ATTSEL=cls OCL_HAS_CLS=0"),
        ({"OCL_ENABLE": "1", "OCL_CKPT": "nowhere"}, "OCL_CKPT=nowhere"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_named_as_it_was_typed(environ, begins):
    with pytest.raises(ValueError) as refused:
        PruningConfig.from_env(environ)
    assert str(refused.value).startswith(begins), refused.value


def test_what_a_model_refuses_is_named_as_it_was_typed(tower, monkeypatch):
    environ = {"BASELINE": "HIPRUNE", "SUBSET_RATIO": "0.5", "HIPRUNE_OBJECT_LAYER": "30", "HIPRUNE_ALPHA": "0.2"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"^HIPRUNE_OBJECT_LAYER=30: .* asks for layer 29 of the vision encoder, of which 2"
    ):
        build(tower)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "nope", "ratio": 0.1}, "unknown method 'nope'"),
        ({"method": None, "ratio": 0.1}, "unknown method None"),
        ({"method": "otprune", "ratio": 0.1, "options": ["gamma"]}, r"must be a mapping.*not \['gamma'\]"),
        ({"method": "otprune", "ratio": 0}, "0 < r <= 1, not 0"),
        ({"method": "otprune", "ratio": float("nan")}, "0 < r <= 1, not nan"),
        ({"method": "otprune", "ratio": "0.1"}, "must be a number"),
        ({"method": "otprune", "ratio": True}, "must be a number"),
        ({"method": "otprune", "ratio": 0.1, "layer": -1}, "whole number >= 0, not -1"),
        ({"method": "otprune", "ratio": 0.1, "layer": 1.0}, "whole number >= 0, not 1.0"),
        ({"method": "otprune", "ratio": 0.1, "options": {"gama": 1.0}}, "no option 'gama'.*gamma, compat"),
        ({"method": "otprune", "ratio": 0.1, "options": {"gamma": "1"}}, "'gamma' of otprune must be a number"),
        ({"method": "otprune", "ratio": 0.1, "options": {"compat": 1}}, "'compat' of otprune must be 1 or 0"),
    ],
)
def test_keyword_arguments_are_checked_alike(settings, said):
    with pytest.raises(ValueError, match=said):
        PruningConfig(**settings)


def test_a_configuration_cannot_be_changed():
    config = PruningConfig(method="otprune", ratio=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ratio = 0.2
    with pytest.raises(TypeError):
        config.options["gamma"] = 1.0


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig("otprune", 0.1, 2, {"gamma": 0.5}),
        PruningConfig("pyramiddrop", 0.5),
        PruningConfig("vtw", layer=3),
        PruningConfig("prumerge", options={"adaptive": True}),
    ],
    ids=lambda config: config.method,
)
def test_a_configuration_can_be_copied_and_sent_to_another_process(config):
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config and hash(same) == hash(config) and same.fingerprint() == config.fingerprint()


def test_the_fingerprint_tells_configurations_apart():
    base = PruningConfig(method="otprune", ratio=0.1)
    assert base.fingerprint() == PruningConfig(method="OURS", ratio=0.1, options={"gamma": None}).fingerprint()
    others = [
        PruningConfig(method="otprune", ratio=0.2),
        PruningConfig(method="otprune", ratio=0.1, layer=1),
        PruningConfig(method="otprune", ratio=0.1, options={"gamma": 0.02}),
        PruningConfig(method="uniform", ratio=0.1),
    ]
    assert len({config.fingerprint() for config in [base, *others]}) == 5


def test_what_a_configuration_says_of_itself_is_json():
    config = PruningConfig(method="otprune", ratio=0.098, layer=2)
    assert json.loads(json.dumps(config.to_dict())) == {
        "method": "otprune",
        "ratio": 0.098,
        "layer": 2,
        "options": {"gamma": None, "compat": False},
    }
    assert config.for_width(192).describe() == (
        "otprune keeps 9.8 % of the visual tokens at decoder layer 2 (gamma=4.551, compat=False)"
    )


def test_a_default_that_depends_on_the_width_is_spelled_out_for_it():
    config = PruningConfig(method="otprune", ratio=0.1, options={"per_crop": True})
    narrow, wide = config.for_width(192), config.for_width(4096)
    assert dict(wide.options) == {"per_crop": True, "gamma": 0.01}
    assert len({config.fingerprint(), narrow.fingerprint(), wide.fingerprint()}) == 3
    assert narrow.for_width(4096) == narrow
    assert PruningConfig(method="random", ratio=0.1).for_width(192).options == {}


@pytest.mark.parametrize(
    ("n", "ratio", "k"),
    [(576, 0.098, 56), (2880, 0.098, 282), (576, 1.0, 576), (64, 0.005, 1), (5, 0.5, 2), (7, 0.5, 4), (1, 0.1, 1)],
)
def test_the_budget_is_rounded_as_python_rounds_and_never_empty(n, ratio, k):
    assert kept_count(n, ratio) == k


def test_every_method_says_what_it_is():
    methods = available_methods()
    assert {"otprune", "random", "uniform", "first_k", "last_k"} <= set(methods)
    assert methods["otprune"].options == {"gamma": None, "compat": False}
    assert all(info.where and info.source for info in methods.values())


def test_a_method_can_be_registered_and_a_taken_name_cannot(monkeypatch):
    from llava.pruning import registry

    monkeypatch.setattr(registry, "_TARGETS", dict(registry._TARGETS))
    register("Mine", "llava.pruning.methods.uniform:Uniform")
    assert PruningConfig.from_env({"BASELINE": "MINE", "SUBSET_RATIO": "0.5"}).method == "mine"
    for name in ("otprune", "OURS", "orig"):
        with pytest.raises(ValueError, match="taken"):
            register(name, "somewhere:Else")
    with pytest.raises(ValueError, match="module:Class"):
        register("other", "somewhere")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("otprune", PruningConfig("otprune", 0.2)),
        ("OURS:gamma=0.05:ratio=0.3", PruningConfig("otprune", 0.3, options={"gamma": 0.05})),
        ("fastv:layer=3", PruningConfig("fastv", 0.2, 3)),
        ("random:seed=1", PruningConfig("random", 0.2, options={"seed": 1})),
    ],
)
def test_a_method_reads_alike_on_every_command_line(text, expected):
    assert PruningConfig.from_text(text, 0.2, {"LAYER_INDEX": "7", "SUBSET_RATIO": "0.9"}) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nonsense", "nonsense"),
        ("otprune:gamma", "an option reads name=value, not 'gamma'"),
        ("otprune:gama=1", "OTPRUNE_GAMA=1"),
        ("otprune:ratio=2", "SUBSET_RATIO=2"),
        ("otprune:layer=x", "LAYER_INDEX=x"),
    ],
)
def test_a_method_that_reads_wrong_is_named(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        PruningConfig.from_text(text, 0.2, {})
