"""Every family in an engine: counts, tokens and log-probabilities are those of transformers on the same kept tokens."""

from __future__ import annotations

import pytest

from images_to_serve import CONVERSATIONS
from served import RATIO, Reference, Served
from tiny_served import FAMILIES, checkpoint

METHODS = ["otprune", "divprune", "downsample", "uniform"]
LOOKING = {
    "visionzip": {},
    "vispruner": {},
    "fastervlm": {},
    "scope": {},
    "holov": {},
    "mmr": {},
    "hiprune": {"object_layer": 1},
    "vscan": {"local_layer": 1},
    "flowcut": {"layers": 1},
}
"""Methods that look at the vision encoder, whose tiny tower has layers enough for these options."""
TOKENS_AT_ONCE = 96


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """An engine whose steps are so small that prompts and batches of images are cut, and transformers' model."""
    folder = checkpoint(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    served = Served(folder, max_num_batched_tokens=TOKENS_AT_ONCE)
    yield served, Reference(folder)
    served.close()


@pytest.mark.parametrize(
    ("method", "ratio"), [("otprune", 1.0), *((method, ratio) for method in METHODS for ratio in (None, 0.5))]
)
def test_answers_are_those_of_transformers(both, method, ratio):
    """The images are the same each time: tokens of another method or ratio from a cache would be noticed, too."""
    served, reference = both
    served.use(method)
    expected = reference.ask(CONVERSATIONS, method, RATIO if ratio is None else ratio)
    found = served.ask(CONVERSATIONS, ratio)
    assert [one.prompt for one in found] == [one.prompt for one in expected]
    assert all(one.agrees(other) for one, other in zip(found, expected, strict=True)), (found, expected)
    assert sum(one.prompt for one in found) > TOKENS_AT_ONCE


@pytest.mark.parametrize("both", [name for name in FAMILIES if name.startswith("llava")], indirect=True)
@pytest.mark.parametrize("method", LOOKING)
def test_methods_that_look_at_the_encoder_see_what_they_see_in_transformers(both, method):
    served, reference = both
    served.use(method, **LOOKING[method])
    expected = reference.ask(CONVERSATIONS, method, **LOOKING[method])
    found = served.ask(CONVERSATIONS)
    assert [one.prompt for one in found] == [one.prompt for one in expected]
    assert all(one.agrees(other) for one, other in zip(found, expected, strict=True)), (found, expected)


def test_a_prefix_from_the_cache_answers_alike(both):
    served, reference = both
    served.use("otprune")
    expected = reference.ask(CONVERSATIONS, "otprune")
    served.ask(CONVERSATIONS)
    found = served.ask(CONVERSATIONS)
    assert all(one.cached >= 32 for one in found if one.prompt > 64)
    assert all(one.agrees(other) for one, other in zip(found, expected, strict=True)), (found, expected)


@pytest.mark.parametrize("both", [name for name in FAMILIES if name.startswith("qwen")], indirect=True)
def test_positions_that_the_runner_puts_in_are_those_that_the_model_puts_in(both):
    """vLLM's runner for GPUs lets `recompute_mrope_positions` place the kept tokens; here it is made to do so."""
    served, reference = both
    assert served.runner.uses_mrope
    served.use("divprune")
    served.llm.reset_prefix_cache()
    served.runner.is_multimodal_pruning_enabled = True
    try:
        for _ in range(2):  # the second time, steps begin inside images
            found = served.ask(CONVERSATIONS, 0.4)
            expected = reference.ask(CONVERSATIONS, "divprune", 0.4)
            assert all(one.agrees(other) for one, other in zip(found, expected, strict=True)), (found, expected)
    finally:
        served.runner.is_multimodal_pruning_enabled = False


def test_memory_is_profiled_with_unpruned_images(both):
    """The vision tower works on all tokens, whatever is kept of them."""
    served, _ = both
    inputs = served.processor.get_dummy_inputs(512, {"image": 1}, mm_options={})
    assert inputs.hf_processor_mm_kwargs["visual_token_ratio"] == 1.0


def test_random_draws_the_same_again_though_not_what_transformers_draws(both):
    """It draws by a digest of the pixels, and the engine's differ in the last bit."""
    served, reference = both
    served.use("random")
    expected, found = reference.ask(CONVERSATIONS, "random"), served.ask(CONVERSATIONS)
    served.llm.reset_prefix_cache()
    again = served.ask(CONVERSATIONS[::-1])[::-1]
    assert [one.prompt for one in found] == [one.prompt for one in expected]
    assert [one.tokens for one in found] == [one.tokens for one in again]


def test_a_wrong_ratio_is_refused_and_the_engine_goes_on(both):
    served, _ = both
    with pytest.raises(ValueError, match="visual_token_ratio must be a number"):
        served.ask(CONVERSATIONS, 2.0)
    assert served.ask(CONVERSATIONS)
