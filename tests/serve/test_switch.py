"""What the plug-in for vLLM serves and what it refuses; none of it needs vLLM."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava.adapters import vllm as plugin
from llava.adapters.vllm.families import FAMILIES
from llava.adapters.vllm.switch import check_servable, configured, ratio_of
from llava.pruning import PruningConfig, available_methods

DOCS = Path(__file__).parents[2] / "LLaVA/docs/serving.md"
SWITCH = {"BASELINE": "OURS", "SUBSET_RATIO": "0.1"}
STATED = {"method": "otprune", "ratio": 0.1}


@pytest.fixture
def vllm(monkeypatch):
    """A vLLM that notes down what is registered."""
    registered = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.33.0", ModelRegistry=registry))
    for name in ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    return registered


def set_environ(monkeypatch, **environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("environ", [{}, {"BASELINE": "ORIG"}, {"VLLM_PLUGINS": "another"}])
def test_nothing_is_registered_while_the_switch_is_off(vllm, monkeypatch, environ):
    set_environ(monkeypatch, **environ)
    plugin.register()
    assert not vllm


@pytest.mark.parametrize("environ", [SWITCH, {"VLLM_PLUGINS": "another,otprune"}])
def test_every_family_is_registered_by_name(vllm, monkeypatch, environ):
    set_environ(monkeypatch, **environ)
    plugin.register()
    assert vllm == {name: f"llava.adapters.vllm.models:{name}" for name in FAMILIES}


@pytest.mark.parametrize(
    ("version", "environ", "sentence"),
    [
        ("0.31.9", SWITCH, "tried with vLLM 0.32.* and 0.33.*, not 0.31.9"),
        ("0.33.0", {"BASELINE": "FASTV", "SUBSET_RATIO": "0.1"}, "fastv drops tokens inside the decoder"),
        ("0.33.0", {**SWITCH, "LAYER_INDEX": "2"}, "otprune drops tokens inside the decoder"),
        ("0.33.0", {**SWITCH, "OTPRUNE_DROP_DUPLICATES": "1"}, "vLLM must know the number beforehand"),
        (
            "0.33.0",
            {**SWITCH, "OTPRUNE_BUDGET": "effective_rank", "OTPRUNE_REFERENCE_RANK": "9"},
            "otprune keeps as many tokens as the image needs, and vLLM must know the number beforehand",
        ),
        ("0.33.0", {"BASELINE": "OURS"}, "a kept ratio is needed"),
        ("0.33.0", {"BASELINE": "OUR", "SUBSET_RATIO": "0.1"}, "unknown method 'OUR'"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_looked_up(vllm, monkeypatch, version, environ, sentence):
    set_environ(monkeypatch, **environ)
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version)
    with pytest.raises(ValueError, match=sentence.replace("*", r"\*")):
        plugin.register()
    assert not vllm


def test_every_method_is_served_or_refused_with_a_reason_and_the_docs_list_those_that_are_served():
    served, reasons = set(), ("inside the decoder", "must know the number", "which vLLM's models do not give")
    for name, info in available_methods().items():
        ratio = 0.5 if "ratio" not in info.options else None
        try:
            config = PruningConfig(name, ratio)
        except ValueError:
            continue  # needs a file (ocvtp)
        try:
            check_servable(config)
            served.add(name)
        except ValueError as error:
            assert str(error).startswith(name) and any(reason in str(error) for reason in reasons)
    listed = [
        name
        for kind in ("By features alone: ", "By the vision encoder, too: ")
        for name in DOCS.read_text().partition(kind)[2].partition(".")[0].split(", ")
    ]
    assert sorted(listed) == sorted(served)


@pytest.mark.parametrize("environ", [{}, SWITCH])
def test_overrides_configure_what_the_environment_may_repeat(environ):
    assert configured(STATED, environ) == PruningConfig("otprune", 0.1)


@pytest.mark.parametrize(
    ("override", "environ", "sentence"),
    [
        (None, {}, "neither BASELINE nor visual_token_pruning names a method"),
        ({"ratio": 0.1}, {}, "must be a mapping with method"),
        ({**STATED, "rate": 1}, {}, "must be a mapping with method"),
        ("otprune", {}, "must be a mapping with method"),
        ({**STATED, "ratio": 0.2}, SWITCH, "BASELINE and visual_token_pruning differ"),
        ({"method": "vtw"}, {}, "vtw"),
        ({**STATED, "options": {"gama": 1}}, {}, "otprune has no option 'gama'"),
    ],
)
def test_wrong_overrides_are_one_sentence(override, environ, sentence):
    with pytest.raises(ValueError, match=sentence):
        configured(override, environ)


def test_a_request_may_name_its_own_ratio():
    assert ratio_of({}, 0.1) == 0.1 and ratio_of({"visual_token_ratio": 1}, 0.1) == 1.0
    for wrong in (0, -1, 1.5, float("nan"), True, "0.5", None, [0.5]):
        with pytest.raises(ValueError, match="visual_token_ratio must be a number with 0 < r <= 1, not"):
            ratio_of({"visual_token_ratio": wrong}, 0.1)
