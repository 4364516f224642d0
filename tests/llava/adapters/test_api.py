"""One call prunes a model of transformers: the public functions, what they refuse, and what they say."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from llava.pruning import Pruner, PruningConfig, apply_switch, kept_count, prune, pruning, registry, unprune
from llava.pruning.base import INSIDE
from llava.pruning.rows import cache_of
from tiny_vlms import IMAGE, SPECIAL, Picture, tiny

ROW = [3, 4, Picture(0), 5, 6]


@torch.no_grad()
def logits(name: str = "qwen2_5_vl") -> torch.Tensor:
    family = tiny(name)
    return family.model(**family.inputs([ROW])).logits


def test_a_block_prunes_and_reports():
    before = logits()
    with pruning(tiny("qwen2_5_vl").model, "otprune", ratio=0.25) as report:
        assert not torch.equal(logits(), before)
        assert report.visual_token_counts == [(16, 4)]
        assert report.config.options["gamma"] == pytest.approx(0.01 * (4096 / 32) ** 2)
    assert torch.equal(logits(), before)


def test_blocks_nest():
    model = tiny("qwen2_5_vl").model
    with pruning(model, "first_k", ratio=0.25) as outer:
        first = logits()
        with pruning(model, "last_k", ratio=0.25):
            assert not torch.equal(logits(), first)
        assert torch.equal(logits(), first)
        assert outer.visual_token_counts == [(16, 4)]


def test_prune_holds_until_unprune(capsys):
    before, model = logits(), tiny("qwen2_5_vl").model
    prune(model, "uniform", ratio=0.5)
    said = capsys.readouterr().err
    assert said == "qwen2_5_vl: uniform keeps 50 % of the visual tokens before the decoder\n"
    assert not torch.equal(logits(), before)
    unprune(model)
    assert torch.equal(logits(), before)


def test_the_switch_reads_the_environment(capsys):
    model = tiny("qwen2_5_vl").model
    assert apply_switch(model, {}) is None and not capsys.readouterr().err
    found = apply_switch(model, {"BASELINE": "DIVPRUNE", "SUBSET_RATIO": "0.25"})
    assert found == PruningConfig("divprune", 0.25) and "divprune keeps 25 %" in capsys.readouterr().err
    with pytest.raises(ValueError, match="SUBSET_RATIO=2"):
        apply_switch(model, {"BASELINE": "OURS", "SUBSET_RATIO": "2"})
    unprune(model)


@pytest.mark.parametrize(
    ("name", "method", "options", "sentence"),
    [
        ("qwen2_vl", "random", {"position_ids": "compact"}, "positions of several axes"),
        ("gemma3", "nonsense", {}, "nonsense"),
        ("llava", "otprune", {"layer": 1, "position_ids": "compact"}, "inside the decoder"),
        ("llava", "otprune", {"layer": 40}, "LAYER_INDEX=40"),
        ("llava", "fitprune", {}, "give llava a recipe"),
        ("qwen3_5", "sparsevlm", {}, "attention of decoder layer 0, which has none"),
        ("gemma3", "otprune", {"gamma": -1.0}, "gamma must be"),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(name, method, options, sentence):
    model, before = tiny(name).model, logits(name)
    with pytest.raises(ValueError, match=sentence), pruning(model, method, ratio=0.5, **options):
        pass
    assert torch.equal(logits(name), before)


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match=r"'Linear' models cannot be pruned: .*qwen2_5_vl"):
        prune(torch.nn.Linear(1, 1), "otprune", ratio=0.1)
    with pytest.raises(ValueError, match="LlavaModel has no language-model head"):
        prune(tiny("llava").model.model, "otprune", ratio=0.1)


def test_a_further_turn_through_generate_is_refused():
    """generate slices the second turn by the length of the pruned cache: it would answer something else."""
    family = tiny("llava")
    inputs = family.inputs([ROW])
    options = {"do_sample": False, "max_new_tokens": 3, "suppress_tokens": SPECIAL, "return_dict_in_generate": True}
    with pruning(family.model, "first_k", ratio=0.2):
        first = family.model.generate(**inputs, **options)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
        with pytest.raises(NotImplementedError, match="without a cache"):
            family.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **options
            )


@torch.no_grad()
def test_a_cache_that_a_method_inside_the_decoder_filled_is_refused_by_another():
    family = tiny("internvl")
    with pruning(family.model, "otprune", ratio=0.4, layer=1):
        cache = cache_of(family.model(**family.inputs([ROW]), use_cache=True))
    with (
        pruning(family.model, "random", ratio=0.4),
        pytest.raises(NotImplementedError, match="lost tokens inside the decoder: go on under that method"),
    ):
        family.model(input_ids=torch.tensor([[7]]), past_key_values=cache)


def test_prompts_that_do_not_go_with_the_images_are_refused():
    family = tiny("llava")
    inputs = family.inputs([ROW])
    inputs["input_ids"][0, inputs["input_ids"][0] == IMAGE] = 5
    with pruning(family.model, "first_k", ratio=0.2), pytest.raises(ValueError, match="0 image tokens"):
        family.model(**inputs)


def test_layers_that_run_twice_cannot_drop():
    family = tiny("llava")
    model = copy.deepcopy(family.model).train()
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    with pruning(model, "fastv", ratio=0.3), pytest.raises(NotImplementedError, match="gradient checkpointing"):
        model(**family.inputs([ROW]))


@dataclass(frozen=True, kw_only=True)
class TwoLayers(Pruner):
    """Looks at the attention in the layer of the drop as well as in the one before."""

    where: ClassVar[str] = INSIDE
    needs: ClassVar[frozenset[str]] = frozenset({"last_attention", "next_attention"})
    first_layer: ClassVar[int] = 1
    default_layer: ClassVar[int] = 2

    def select(self, tokens):
        both = (tokens.last_attention + tokens.next_attention).mean(dim=-1)
        return both.argsort(dim=-1, descending=True)[:, : tokens.k]


@dataclass(frozen=True, kw_only=True)
class Neighbours(TwoLayers):
    """The same at two layers, of which the first is looked at for both."""

    def schedule_for(self, ratio, layer, num_layers):
        return ((1, 2 * ratio), (2, ratio))


@dataclass(frozen=True, kw_only=True)
class LargestState(Pruner):
    """Looks at no attention."""

    where: ClassVar[str] = INSIDE
    needs: ClassVar[frozenset[str]] = frozenset({"states"})
    first_layer: ClassVar[int] = 1
    default_layer: ClassVar[int] = 1

    def select(self, tokens):
        return tokens.states.norm(dim=-1).argsort(dim=-1, descending=True)[:, : tokens.k]


@pytest.mark.parametrize(("name", "method"), [("llava", TwoLayers), ("llava", Neighbours), ("qwen3_5", LargestState)])
def test_a_method_gets_what_it_needs_of_each_layer(name, method, monkeypatch):
    """Of Qwen3.5's first layers, which have no attention, the states."""
    monkeypatch.setitem(registry._TARGETS, "own", f"{__name__}:{method.__name__}")
    with pruning(tiny(name).model, "own", ratio=0.25) as report:
        assert logits(name).isfinite().all()
        [(total, kept)] = report.visual_token_counts
        assert kept == kept_count(total, 0.25)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_labels_train_what_is_kept(name, method):
    """The loss of a batch is the mean over its rows' predicted tokens, 3 and 2; the projector has a gradient."""
    family = tiny(name)
    rows, first_answer = [[3, Picture(0), 5, 6, 7], [4, Picture(1), Picture(2), 6, 7]], 5

    def loss(rows):
        inputs = family.inputs(rows, side="right")
        text = inputs["attention_mask"].bool() & (inputs["input_ids"] < IMAGE) & (inputs["input_ids"] >= first_answer)
        return family.model(**inputs, labels=inputs["input_ids"].masked_fill(~text, -100)).loss

    with pruning(family.model, method, ratio=0.3):
        together, alone = loss(rows), [loss([row]) for row in rows]
        assert together.item() == pytest.approx(((3 * alone[0] + 2 * alone[1]) / 5).item(), rel=1e-3)
        features = [p for n, p in family.model.named_parameters() if "visual" in n or "vision" in n or "project" in n]
        gradients = torch.autograd.grad(together, features, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
