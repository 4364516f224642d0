"""Pruning a model of transformers changes nothing but which visual tokens are there, in every family."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch

import tiny_vlms
from llava.adapters.transformers import FAMILIES, set_pruning
from llava.adapters.transformers.inputs import cache_of
from llava.pruning import PruningConfig, kept_count
from tiny_vlms import SPECIAL, TINY, Picture, TinyModel, tiny

ROWS = [
    [3, 4, Picture(0, 1), 5, 6, 7],
    [8, Picture(1, 0), 9, 11, Picture(2, 2), 10, 12],
    [13, 14, 15, 16, 17],
    [20, Picture(3, 3), 21],
]
NEW = 4
METHODS = [("otprune", {}), ("hiprune", {"object_layer": 3}), ("divprune", {}), ("random", {}), ("downsample", {})]
"""A family each, in turn; what they share is what is tested."""


def generated(tiny: TinyModel, rows: list, **options) -> torch.Tensor:
    inputs = tiny.inputs(rows)
    options = {"do_sample": False, "max_new_tokens": NEW, "suppress_tokens": SPECIAL} | options
    return tiny.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def last_logits(tiny: TinyModel, rows: list) -> torch.Tensor:
    return tiny.model(**tiny.inputs(rows)).logits[:, -1]


@contextmanager
def pruned(tiny: TinyModel, method: tuple[str, dict], ratio: float = 0.4):
    session = set_pruning(tiny.model, PruningConfig(method[0], ratio, options=method[1]))
    try:
        yield session
    finally:
        set_pruning(tiny.model, None)


@pytest.fixture(params=sorted(TINY))
def family(request) -> TinyModel:
    return tiny(request.param)


@pytest.fixture
def method(request) -> tuple[str, dict]:
    name = request.node.callspec.params["family"]
    found = METHODS[sorted(TINY).index(name) % len(METHODS)]
    looks = FAMILIES[tiny(name).model.config.model_type].to_tokens is not None
    return found if looks or found[0] != "hiprune" else METHODS[0]


def test_ratio_1_is_the_untouched_model_bit_for_bit(family, method):
    before = last_logits(family, ROWS), generated(family, ROWS)
    with pruned(family, method, 1.0):
        assert torch.equal(last_logits(family, ROWS), before[0])
        assert torch.equal(generated(family, ROWS), before[1])


def test_the_model_is_restored(family, method):
    before = last_logits(family, ROWS)
    with pruned(family, method):
        assert not torch.equal(last_logits(family, ROWS), before)
    assert torch.equal(last_logits(family, ROWS), before)
    assert not family.model._forward_pre_hooks and not family.model._forward_hooks
    assert "get_image_features" not in vars(family.model.base_model)


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (10, 730)], ids=lambda size: "{}x{}".format(*size))
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_thin_image_is_pruned(name, size, monkeypatch):
    """Unpadding leaves a row of its crops, newlines alone, or nothing."""
    monkeypatch.setattr(tiny_vlms, "_ANYRES_SIZES", [size])
    family, row = tiny(name), [3, Picture(0), 5, 6]
    total = family.inputs([row])["input_ids"].shape[1] - 3
    for method, per_crop in itertools.product(("otprune", "downsample"), (False, True)):
        with pruned(family, (method, {"per_crop": per_crop})) as session:
            assert last_logits(family, [row]).isfinite().all()
            assert list(session.visual_token_counts) == [(total, kept_count(total, 0.4))]


def test_a_batch_is_its_rows(family, method):
    with pruned(family, method) as session:
        together, answers = last_logits(family, ROWS), generated(family, ROWS)
        counts = list(session.visual_token_counts)
        alone = []
        for row, logits, answer in zip(ROWS, together, answers, strict=True):
            torch.testing.assert_close(last_logits(family, [row])[0], logits, rtol=1e-3, atol=1e-3)
            assert torch.equal(generated(family, [row])[0], answer)
            alone += session.visual_token_counts if any(isinstance(part, Picture) for part in row) else []
    assert counts == alone
    if method[0] != "downsample":  # which rounds to whole rows and columns
        assert all(kept == max(1, round(0.4 * total)) for total, kept in counts)


def test_decoding_with_a_cache_is_decoding_without(family, method):
    with pruned(family, method):
        assert torch.equal(generated(family, ROWS), generated(family, ROWS, use_cache=False))


@torch.no_grad()
def test_a_loop_through_forward_is_generate(family, method):
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
    with pruned(family, ("first_k", {"position_ids": "original"})) as session:
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
