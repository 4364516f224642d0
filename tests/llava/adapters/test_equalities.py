"""Pruning a model of transformers changes nothing but which visual tokens are there, in every family."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch

import tiny_vlms
from llava.adapters.transformers import FAMILIES, set_pruning
from llava.pruning import PruningConfig, kept_count
from llava.pruning.rows import cache_of
from tiny_methods import TWICE
from tiny_vlms import SPECIAL, TINY, Picture, TinyModel, tiny

ROWS = [
    [3, 4, Picture(0, 1), 5, 6, 7],
    [8, Picture(1, 0), 9, 11, Picture(2, 2), 10, 12],
    [13, 14, 15, 16, 17],
    [20, Picture(3, 3), 21],
]
NEW = 4


class Method(NamedTuple):
    name: str
    options: Mapping = MappingProxyType({})
    layer: int | None = None
    ratio: float = 0.4


METHODS = {
    "before": [
        Method("otprune"),
        Method("hiprune", {"object_layer": 3}),
        Method("divprune"),
        Method("random"),
        Method("downsample"),
    ],
    "inside": [
        Method("otprune", layer=1),
        Method("fastv"),
        Method("vscan", TWICE),
        Method("dart"),
        Method("pyramiddrop", ratio=0.6),
        Method("sparsevlm", ratio=0.6),
        Method("vtw", ratio=0.6),
        Method("downsample", layer=2),
        Method("random", layer=0, ratio=0.5),
    ],
}
"""A family each, in turn; what they share is what is tested."""
HIDDEN = [
    Method("otprune"),
    Method("otprune", layer=1),
    Method("divprune", {"position_ids": "original"}),
    Method("fastv"),
    Method("random"),
    Method("vtw", ratio=0.6),
    Method("uniform", {"position_ids": "original"}),
    Method("random", layer=2),
    Method("dart"),
]
"""Methods that merge nothing and drop in one place, before the decoder or inside it."""
SETTINGS = list(itertools.product((torch.float32, torch.bfloat16), ("sdpa", "eager")))
SAMPLING = [{}, {"num_return_sequences": 2}, {"num_beams": 2, "num_return_sequences": 2}]


ASKS_THE_TEXT = ("dart", "fastv", "pyramiddrop", "sparsevlm", "vscan")
"""Without a cache the answer's newest token would rank."""


def generated(tiny: TinyModel, rows: list, **options) -> torch.Tensor:
    inputs = tiny.inputs(rows)
    options = {"do_sample": False, "max_new_tokens": NEW, "suppress_tokens": SPECIAL} | options
    return tiny.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def last_logits(tiny: TinyModel, rows: list) -> torch.Tensor:
    return tiny.model(**tiny.inputs(rows)).logits[:, -1]


def attached(tiny: TinyModel) -> list[tuple]:
    """Whatever could be left of pruning on a model's modules."""
    return [
        (len(one._forward_pre_hooks), len(one._forward_hooks), sorted(vars(one)), id(getattr(one, "config", None)))
        for one in tiny.model.modules()
    ]


@contextmanager
def pruned(tiny: TinyModel, method: Method):
    session = set_pruning(tiny.model, PruningConfig(method.name, method.ratio, method.layer, method.options))
    try:
        yield session
    finally:
        set_pruning(tiny.model, None)


@pytest.fixture(params=sorted(TINY))
def family(request) -> TinyModel:
    return tiny(request.param)


@pytest.fixture(params=sorted(METHODS))
def method(request) -> Method:
    name, methods = request.node.callspec.params["family"], METHODS[request.param]
    found = methods[sorted(TINY).index(name) % len(methods)]
    looks = FAMILIES[tiny(name).model.config.model_type].to_tokens is not None
    if (found.name in ("hiprune", "vscan") and not looks) or (name == "qwen3_5" and found.name in ASKS_THE_TEXT):
        return methods[0]  # Qwen3.5's first layers have no attention
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_1_is_the_untouched_model_bit_for_bit(family, method, dtype):
    same = dataclasses.replace(family, model=copy.deepcopy(family.model).to(dtype))
    before = last_logits(same, ROWS), generated(same, ROWS)
    with pruned(same, method._replace(ratio=1.0)):
        assert torch.equal(last_logits(same, ROWS), before[0])
        assert torch.equal(generated(same, ROWS), before[1])


def test_the_model_is_restored(family, method):
    before, hooks = last_logits(family, ROWS), attached(family)
    with pruned(family, method):
        assert attached(family) != hooks
        assert not torch.equal(last_logits(family, ROWS), before)
    assert torch.equal(last_logits(family, ROWS), before)
    assert attached(family) == hooks


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (10, 730)], ids=lambda size: "{}x{}".format(*size))
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_thin_image_is_pruned(name, size, monkeypatch):
    """Unpadding leaves a row of its crops, newlines alone, or nothing."""
    monkeypatch.setattr(tiny_vlms, "_ANYRES_SIZES", [size])
    family, row = tiny(name), [3, Picture(0), 5, 6]
    total = family.inputs([row])["input_ids"].shape[1] - 3
    for method, per_crop in itertools.product(("otprune", "downsample"), (False, True)):
        with pruned(family, Method(method, {"per_crop": per_crop})) as session:
            assert last_logits(family, [row]).isfinite().all()
            assert list(session.visual_token_counts) == [(total, kept_count(total, 0.4))]


def test_a_batch_is_its_rows(family, method):
    with pruned(family, method) as session:
        together, answers = last_logits(family, ROWS), generated(family, ROWS)
        counts = list(session.visual_token_counts)
        alone = []
        for row, logits, answer in zip(ROWS, together, answers, strict=True):
            if method.name != "dart":  # as in the loop through forward
                torch.testing.assert_close(last_logits(family, [row])[0], logits, rtol=1e-3, atol=1e-3)
            assert torch.equal(generated(family, [row])[0], answer)
            alone += session.visual_token_counts if any(isinstance(part, Picture) for part in row) else []
    assert counts == alone
    if method in METHODS["before"] and method.name != "downsample":  # which rounds to whole rows and columns
        assert all(kept == max(1, round(0.4 * total)) for total, kept in counts)


def test_decoding_with_a_cache_is_decoding_without(family, method):
    if method.name in ASKS_THE_TEXT:
        method = METHODS["inside"][0]
    with pruned(family, method):
        assert torch.equal(generated(family, ROWS), generated(family, ROWS, use_cache=False))


@torch.no_grad()
def test_a_loop_through_forward_is_generate(family, method):
    if method.name == "dart":  # without positions padding counts as some, and they turn the keys that dart ranks by
        method = METHODS["inside"][0]
    with pruned(family, method):
        expected = generated(family, ROWS)
        inputs = family.inputs(ROWS)
        output, mask, answer = family.model(**inputs, use_cache=True), inputs["attention_mask"], []
        for _ in range(NEW):
            logits = output.logits[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
            answer.append(logits.argmax(-1, keepdim=True))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = family.model(input_ids=answer[-1], attention_mask=mask, past_key_values=cache_of(output))
    assert torch.equal(torch.cat(answer, dim=1), expected)


@pytest.mark.parametrize("helper", ["assistant_model", "prompt_lookup_num_tokens"])
@pytest.mark.parametrize("name", sorted(set(TINY) - {"paligemma", "qwen3_5"}))
def test_assisted_decoding_is_greedy(name, helper):
    """Its first call holds candidates beside the prompt, and the cache is cropped behind those that are refused.

    PaliGemma reads candidates as a part of its prefix, and Qwen3.5's state cannot be cropped.
    """
    family, row = tiny(name), [3, 4, Picture(0, 1), 5, 6, 7, 8, 5, 6, 7, 9, 5, 6]
    method = HIDDEN[sorted(TINY).index(name) % len(HIDDEN)]
    assistant = {"assistant_model": family.model, "prompt_lookup_num_tokens": 3}
    with pruned(family, method):
        greedy = generated(family, [row], max_new_tokens=8)
        assert torch.equal(generated(family, [row], max_new_tokens=8, **{helper: assistant[helper]}), greedy)


def test_beams_of_a_batch_are_those_of_its_rows(family, method):
    with pruned(family, method):
        together = generated(family, ROWS, num_beams=2)
        alone = [generated(family, [row], num_beams=2)[0] for row in ROWS]
    assert torch.equal(torch.stack(alone), together)


MASKABLE = sorted(set(TINY) - {"qwen3_5"})
"""Families whose text layers look at what came before; Qwen3.5's keep a running state of it."""
GAPS = [method for method in HIDDEN if method.layer or method.options or method.name in ("dart", "fastv", "vtw")]
"""Those that keep original positions."""


def hidden_method(name: str, turn: int) -> Method:
    """Another one for each family and turn; in the tests together each meets all families but for a few."""
    return HIDDEN[(MASKABLE.index(name) + turn) % len(HIDDEN)]


@cache
def far_sighted(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> TinyModel:
    """A family's model with a sliding window, if any, that holds whole prompts: it counts what is there."""
    made = tiny(name, attention)
    model = copy.deepcopy(made.model).to(dtype)
    text = model.config.get_text_config()
    if getattr(text, "sliding_window", None) is not None:
        text.sliding_window = 4096
    return dataclasses.replace(made, model=model)


def columns_left(tiny: TinyModel, inputs: dict, session) -> torch.Tensor:
    """False at padding and at the image tokens that were dropped of the latest prompts: (B, T), bool."""
    left, begin = inputs["attention_mask"].bool(), 0
    marks = (inputs["input_ids"] == tiny.model.config.image_token_id).nonzero()
    for (total, _), kept in zip(session.visual_token_counts, session.kept, strict=True):
        dropped = torch.ones(total, dtype=torch.bool).index_fill(0, kept, False)
        left[tuple(marks[begin : begin + total][dropped].T)] = False
        begin += total
    return left


@contextmanager
def nobody_looks(tiny: TinyModel, left: torch.Tensor, first: int):
    """Nothing is removed; from layer ``first`` on nobody may look at columns of the prompts that are not ``left``."""

    def hook(depth: int):
        def before(layer, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
            new, past = states.shape[1], 0 if cache is None else cache.get_seq_length(depth)
            rows = left.repeat_interleave(len(states) // len(left), dim=0)
            seen = torch.cat([rows, rows.new_ones(len(rows), past + new - rows.shape[1])], dim=1)[:, None, None]
            if mask is None:
                mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
            allowed = seen & (mask if mask.dtype == torch.bool else mask == 0)
            hiding = torch.zeros(allowed.shape, dtype=states.dtype)
            return args, kwargs | {"attention_mask": hiding.masked_fill(~allowed, torch.finfo(states.dtype).min)}

        return before

    layers = list(enumerate(tiny.model.get_decoder().layers))[first:]
    handles = [layer.register_forward_pre_hook(hook(depth), with_kwargs=True) for depth, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def counted(tiny: TinyModel, inputs: dict) -> torch.Tensor:
    """Rotary positions of prompts, as generate counts."""
    first = FAMILIES[tiny.model.config.model_type].first_position
    return tiny.model._prepare_position_ids_for_generation(inputs["input_ids"], inputs) + first


def positions_left(tiny: TinyModel, inputs: dict, left: torch.Tensor, method: Method) -> torch.Tensor:
    """The same as pruning has them: with gaps, or as if only what is left were there."""
    gaps = method in GAPS or hasattr(tiny.model.base_model, "get_rope_index")
    return counted(tiny, inputs if gaps else inputs | {"attention_mask": left.long()})


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"{setting[0]}-{setting[1]}".removeprefix("torch."))
@pytest.mark.parametrize("name", MASKABLE)
@torch.no_grad()
def test_dropping_is_masking(name, setting):
    """The unpruned model in which nobody looks at the dropped tokens has the same logits.

    In bfloat16 they may be as far from each other as rounding takes the unpruned model from its own in float32.
    """
    dtype, attention = setting
    method = hidden_method(name, SETTINGS.index(setting))
    family = far_sighted(name, attention, dtype)
    inputs = family.inputs(ROWS)
    with pruned(family, method) as session:
        found = family.model(**inputs).logits
        left, first = columns_left(family, inputs, session), max(layer for layer, _ in session.schedule)
        explicit = inputs | {"position_ids": positions_left(family, inputs, left, method)}
    with nobody_looks(family, left, first):
        expected = family.model(**explicit).logits
    assert found[~left & inputs["attention_mask"].bool()].eq(0).all()
    if dtype == torch.float32:
        torch.testing.assert_close(found[left], expected[left], rtol=1e-3, atol=1e-3)
        return
    exact = far_sighted(name, attention)
    with nobody_looks(exact, left, first):
        unrounded = exact.model(**explicit).logits
    rounding = (expected - unrounded)[left].square().mean().sqrt()
    assert (found - expected)[left].float().square().mean().sqrt() <= rounding


def sampled(tiny: TinyModel, options: Mapping, rows: list, **inputs: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return generated(tiny, rows, do_sample=True, **options, **inputs)


def test_sampling_at_ratio_1_is_the_untouched_models(family, method, request):
    options = SAMPLING[sorted(TINY).index(request.node.callspec.params["family"]) % len(SAMPLING)]
    before = sampled(family, options, ROWS)
    with pruned(family, method._replace(ratio=1.0)):
        assert torch.equal(sampled(family, options, ROWS), before)


@pytest.mark.parametrize("turn", range(2))
@pytest.mark.parametrize("name", MASKABLE)
@torch.no_grad()
def test_sampled_tokens_are_those_of_the_model_that_does_not_look(name, turn):
    family, method, options = far_sighted(name), hidden_method(name, turn), SAMPLING[MASKABLE.index(name) % 3]
    rows = [ROWS[0], ROWS[3]]  # GLM of transformers mixes up the images of rows with several, if they are repeated
    inputs = family.inputs(rows)
    with pruned(family, method) as session:
        # As generate counts: keys, which DART ranks by, depend on it.
        family.model(**inputs, position_ids=counted(family, inputs))
        left, first = columns_left(family, inputs, session), max(layer for layer, _ in session.schedule)
        positions = positions_left(family, inputs, left, method)
        found = sampled(family, options, rows)
    with nobody_looks(family, left, first):
        expected = sampled(family, options, rows, position_ids=positions)
    assert torch.equal(found, expected)


def test_every_supported_family_is_tested():
    assert set(FAMILIES) == {tiny(name).model.config.model_type for name in TINY}
