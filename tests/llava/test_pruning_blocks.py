"""`with pruning(...)`: what prunes inside, and what does afterwards; blocks in blocks, in threads, around wrappers."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from llava.model.active_pruner import ActivePruner
from llava.model.visual_cache import VisualCache
from llava.pruning import PruningConfig, apply_switch, prune, pruning, unprune
from llava.pruning.methods.uniform import Uniform
from tiny_llava import pixels, prompt

N = 16
BY_HAND = ActivePruner(Uniform(), ((0, 0.25),))


def kept(model) -> int:
    with torch.no_grad():
        model(input_ids=prompt(3, 5)[None], images=pixels(1))
    return model.visual_token_counts[0][1]


@pytest.fixture(autouse=True)
def unpruned(model):
    yield
    assert model.active_pruner == ActivePruner()


def test_the_context_manager_restores_what_was_before(model):
    before = PruningConfig(method="uniform", ratio=0.5)
    model.set_pruning(before)
    with pytest.raises(RuntimeError, match="stop"), pruning(model, "otprune", ratio=0.1):
        assert model.pruning.method == "otprune"
        raise RuntimeError("stop")
    assert model.pruning == before
    model.set_pruning(None)


def test_a_block_restores_a_pruner_that_was_set_by_hand(model):
    model.active_pruner = BY_HAND
    assert model.pruning is None and kept(model) == 4
    with pruning(model, "first_k", ratio=0.5):
        assert kept(model) == 8
    assert model.active_pruner == BY_HAND and kept(model) == 4
    model.active_pruner = ActivePruner()


def test_a_pruner_set_by_hand_is_not_taken_for_the_configuration_before_it(model):
    model.set_pruning(PruningConfig("first_k", 0.5))
    model.active_pruner = BY_HAND
    assert model.pruning is None
    model.set_pruning(None)


def test_a_cache_of_images_knows_a_pruner_that_was_set_by_hand(model):
    model.visual_cache = VisualCache(2**20)
    try:
        assert kept(model) == N
        model.active_pruner = BY_HAND
        assert kept(model) == 4 and model.visual_cache.hits == 1
    finally:
        model.active_pruner = ActivePruner()
        model.visual_cache = None


def test_a_configuration_can_be_given_as_it_is(model):
    with pruning(model, PruningConfig("first_k", 0.25, layer=2)):
        assert model.pruning == PruningConfig("first_k", 0.25, layer=2)


def test_blocks_stand_in_one_another(model):
    with pruning(model, "first_k", ratio=0.5):
        with pruning(model, "first_k", ratio=0.25):
            assert kept(model) == 4
        assert kept(model) == 8


def test_the_outer_block_may_end_first(model):
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(pruning(model, "first_k", ratio=0.5))
    inner.enter_context(pruning(model, "first_k", ratio=0.25))
    outer.close()
    assert kept(model) == 4
    inner.close()


def test_a_second_thread_is_refused_and_changes_nothing(model):
    def in_a_block():
        with pruning(model, "first_k", ratio=0.25):
            return kept(model)

    with ThreadPoolExecutor(1) as pool:
        with pruning(model, "first_k", ratio=0.5):
            with pytest.raises(
                RuntimeError, match=r"another thread or task.*one method at a time, so first_k has to wait"
            ):
                pool.submit(in_a_block).result()
            assert kept(model) == 8
        assert pool.submit(in_a_block).result() == 4


def test_a_second_task_is_refused(model):
    async def in_a_block(ratio: float) -> float:
        with pruning(model, "first_k", ratio=ratio):
            await asyncio.sleep(0)
            return model.pruning.ratio

    async def both():
        return await asyncio.gather(in_a_block(0.5), in_a_block(0.25), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first == 0.5 and isinstance(second, RuntimeError)


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel: the model's own attributes are out of sight."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("wrap", [adapted, Wrapper, lambda model: Wrapper(adapted(model))])
def test_a_wrapped_model_is_pruned_inside(model, wrap, monkeypatch, capsys):
    wrapped = wrap(model)
    try:
        for name, value in {"BASELINE": "FIRST_K", "SUBSET_RATIO": "0.5"}.items():
            monkeypatch.setenv(name, value)
        assert apply_switch(wrapped).method == "first_k" and kept(model) == 8
        prune(wrapped, "first_k", ratio=0.75)
        with pruning(wrapped, "first_k", ratio=0.25) as report:
            assert kept(model) == 4 and report.visual_token_counts == [(N, 4)]
        assert kept(model) == 12
        unprune(wrapped)
        assert kept(model) == N
        assert "llava_llama: first_k keeps 75 %" in capsys.readouterr().err
    finally:
        if hasattr(wrapped, "unload"):
            wrapped.unload()
