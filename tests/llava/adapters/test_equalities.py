"""Pruning a model of transformers changes nothing but which visual tokens are there, in every family."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from contextlib import contextmanager
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


def test_ratio_1_is_the_untouched_model_bit_for_bit(family, method):
    before = last_logits(family, ROWS), generated(family, ROWS)
    with pruned(family, method._replace(ratio=1.0)):
        assert torch.equal(last_logits(family, ROWS), before[0])
        assert torch.equal(generated(family, ROWS), before[1])


@torch.no_grad()
def test_ratio_1_is_the_untouched_model_in_bfloat16(family, method):
    half = dataclasses.replace(family, model=copy.deepcopy(family.model).bfloat16())
    before = last_logits(half, ROWS)
    with pruned(half, method._replace(ratio=1.0)):
        assert torch.equal(last_logits(half, ROWS), before)
    with pruned(half, method) as session:
        assert last_logits(half, ROWS).isfinite().all()
        assert all(kept < total for total, kept in session.visual_token_counts)


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


def test_beams_of_a_batch_are_those_of_its_rows(family, method):
    with pruned(family, method):
        together = generated(family, ROWS, num_beams=2)
        alone = [generated(family, [row], num_beams=2)[0] for row in ROWS]
    assert torch.equal(torch.stack(alone), together)


MASKABLE = sorted(set(TINY) - {"aya_vision", "cohere2_vision", "gemma3", "qwen3_5", "paligemma"})
"""Families whose text layers all see everything before: a sliding window or a running state counts what is there, and
PaliGemma's prefix reads in both directions."""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MASKABLE)
@torch.no_grad()
def test_dropping_is_masking(name, attention):
    """First-K with original positions: the unpruned model that may not look at the other image tokens."""
    family = tiny(name, attention)
    row, k = ROWS[0], None
    inputs = family.inputs([row])
    with pruned(family, Method("first_k", {"position_ids": "original"})) as session:
        found = family.model(**inputs).logits[0]
        counts = session.visual_token_counts
    marks = (inputs["input_ids"][0] == family.model.config.image_token_id).nonzero().flatten()
    kept, begin = inputs["attention_mask"].clone(), 0
    for total, k in counts:
        kept[0, marks[begin + k : begin + total]] = 0
        begin += total
    positions = family.model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)
    expected = family.model(**inputs | {"attention_mask": kept, "position_ids": positions}).logits[0]
    text = kept[0].bool()
    torch.testing.assert_close(found[text], expected[text], rtol=1e-3, atol=1e-3)
    assert found[~text].eq(0).all()


def test_every_supported_family_is_tested():
    assert set(FAMILIES) == {tiny(name).model.config.model_type for name in TINY}
