"""What goes on with a filled KV cache: the cache knows where its padding and its positions are."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from llava.constants import IGNORE_INDEX
from llava.model.language_model.kv_cache import CACHE
from llava.pruning import available_methods, pruning
from llava.pruning.registry import method_class
from tiny_llava import pad_rows, pixels, prompt
from tiny_methods import OPTIONS, RATIOS
from tiny_trained import trained_networks

POSITIONS = ["auto", "original", "compact"]
METHODS = [(name, layer) for name in sorted(available_methods()) if name not in RATIOS for layer in (0, 2)]
METHODS = [(name, layer) for name, layer in METHODS if method_class(name)().first_layer <= layer]
METHODS += [(name, None) for name in RATIOS]


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, dict]:
    return OPTIONS | trained_networks(tmp_path_factory.mktemp("trained"))


def question(length: int, seed: int) -> torch.Tensor:
    return prompt(length, seed=seed)[1:]


def in_turns(model, ids, mask, images, questions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two answers (B, 2) and (B, 3) to a prompt and a question each, and the logits (B, V) after the question."""
    cache = DynamicCache(config=model.config)
    settings = {"do_sample": False, CACHE: cache}
    first = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=2, **settings)
    # The last token was said, but not read yet.
    turns, turn_mask = pad_rows([torch.cat([said[-1:], own]) for said, own in zip(first, questions, strict=True)])
    with torch.no_grad():
        logits = model(input_ids=turns, attention_mask=turn_mask, **{CACHE: copy.deepcopy(cache)}).logits
    logits = logits[range(len(turns)), turn_mask.sum(dim=1) - 1]
    return first, model.generate(turns, attention_mask=turn_mask, max_new_tokens=3, **settings), logits


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("method", "layer"), METHODS, ids=str)
def test_two_turns_are_one_prompt(model, options, method, layer, positions):
    """Rows with one and two images, and questions of different lengths."""
    rows, images = [prompt(3, 9, seed=1), prompt(6, 4, 5, seed=2)], pixels(3)
    ids, mask = pad_rows(rows)
    questions = [question(4, seed=3), question(2, seed=4)]
    switch = {"ratio": RATIOS.get(method, 0.3), "layer": layer, "position_ids": positions} | options.get(method, {})
    with pruning(model, method, **switch), torch.no_grad():
        *answers, after = in_turns(model, ids, mask, images, questions)
        for i, (row, own) in enumerate(zip(rows, (images[:1], images[1:]), strict=True)):
            first, second = (answer[i] for answer in answers)
            said = torch.cat([first, questions[i], second])
            # As labels, what was said takes no part in choosing.
            labels = torch.cat([torch.full_like(row, IGNORE_INDEX), said])[None]
            whole = model(input_ids=torch.cat([row, said])[None], labels=labels, images=own, use_cache=False).logits[0]
            assert whole[-4:-1].argmax(dim=-1).tolist() == second.tolist()
            torch.testing.assert_close(after[i], whole[-4], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("method", ["otprune", "first_k"])
def test_a_second_turn_may_bring_an_image(model, method, positions):
    ids, images = prompt(3, 9, seed=1)[None], pixels(2)
    turn = question(5, seed=3)
    turn[2] = -200
    with pruning(model, method, ratio=0.3, position_ids=positions), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, images=images[:1], **{CACHE: cache})
        said = model.generate(turn[None], images=images[1:], max_new_tokens=3, **{CACHE: cache})
        whole = model.generate(torch.cat([ids[0], turn])[None], images=images, max_new_tokens=3)
    assert said.tolist() == whole.tolist()


def test_a_cache_goes_on_as_it_was_filled_when_the_switch_has_changed(model):
    """And one that was cropped, or emptied, is what it was then."""
    ids, images, turn = prompt(3, 9)[None], pixels(1), question(5, seed=3)[None]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with pruning(model, "otprune", ratio=0.3, layer=2, position_ids="compact"):
            model(input_ids=ids, images=images, **{CACHE: cache})
            expected = model(input_ids=turn, **{CACHE: copy.deepcopy(cache)}).logits
        assert torch.equal(model(input_ids=turn, **{CACHE: cache}).logits, expected)
        cache.crop(-turn.shape[1])
        torch.testing.assert_close(model(input_ids=turn, **{CACHE: cache}).logits, expected)
        emptied = DynamicCache(config=model.config)
        emptied.filling = cache.filling
        assert torch.equal(model(input_ids=turn, **{CACHE: emptied}).logits, model(input_ids=turn).logits)


@pytest.mark.parametrize(("method", "layer"), [("otprune", 2), ("fitprune", None)])
def test_images_after_a_filled_cache_are_refused_where_the_decoder_drops(model, options, method, layer):
    ids, images = prompt(3, 9)[None], pixels(1)
    cache = DynamicCache(config=model.config)
    switch = {"ratio": RATIOS.get(method, 0.3), "layer": layer} | options.get(method, {})
    with pruning(model, method, **switch), torch.no_grad():
        model(input_ids=ids, images=images, **{CACHE: cache})
        with pytest.raises(NotImplementedError, match="does not take images after a filled KV cache"):
            model(input_ids=ids, images=images, **{CACHE: cache})
