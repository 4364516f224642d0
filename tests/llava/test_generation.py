"""Forward and generate: the arguments that callers of the original use, in their places and with their meaning."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from llava.pruning import pruning
from tiny_llava import pixels, prompt

ANSWER = 6


@pytest.fixture
def ids() -> torch.Tensor:
    return prompt(3, 4)[None]


def new_tokens(model, ids, **settings) -> int:
    return model.generate(ids, images=pixels(1), **settings).shape[1]


def test_forward_takes_the_original_arguments_by_place(model, ids):
    """..., labels, use_cache, output_attentions, output_hidden_states, images, image_sizes, return_dict."""
    images = pixels(1)
    by_place = model(ids, None, None, None, None, None, True, None, True, images, [(56, 56)], True)
    by_name = model(input_ids=ids, images=images)
    torch.testing.assert_close(by_place.logits, by_name.logits)
    assert len(by_place.hidden_states) == model.config.num_hidden_layers + 1 and by_name.hidden_states is None


@pytest.mark.parametrize("layer", [0, 2])
def test_forward_gives_a_tuple_where_one_is_asked_for(model, ids, layer):
    labels = ids.clone()
    labels[:, :5] = -100
    arguments = {"input_ids": ids, "labels": labels, "images": pixels(1)}
    with pruning(model, "otprune", ratio=0.5, layer=layer):
        loss, logits, _ = model(**arguments, return_dict=False)
        expected = model(**arguments)
    torch.testing.assert_close((loss, logits), (expected["loss"], expected["logits"]))


@pytest.mark.parametrize("layer", [0, 2])
def test_the_loss_is_of_what_has_logits_and_counts_as_the_trainer_tells(model, ids, layer):
    labels = ids.clone()
    labels[:, :-3] = -100
    arguments = {"input_ids": ids, "labels": labels, "images": pixels(1)}
    with pruning(model, "otprune", ratio=0.5, layer=layer), torch.no_grad():
        whole = model(**arguments).loss
        torch.testing.assert_close(model(**arguments, logits_to_keep=4).loss, whole)
        torch.testing.assert_close(model(**arguments, num_items_in_batch=12).loss, whole * 3 / 12)


def test_max_length_counts_the_new_tokens_and_one_more(model, ids):
    assert new_tokens(model, ids, max_length=ANSWER + 1) == ANSWER
    assert new_tokens(model, ids, generation_config=GenerationConfig(max_length=ANSWER + 1)) == ANSWER


def test_a_generation_config_is_left_as_it_is_and_rules_over_the_models_own(model, ids, monkeypatch):
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 50)
    config = GenerationConfig(max_length=ANSWER + 1)
    assert new_tokens(model, ids, generation_config=config) == ANSWER
    assert (config.max_length, config.max_new_tokens) == (ANSWER + 1, None)
    both = GenerationConfig(max_length=30, max_new_tokens=ANSWER)
    assert new_tokens(model, ids, generation_config=both) == ANSWER


def test_a_generation_config_that_samples_keeps_its_temperature(model, ids):
    greedy = model.generate(ids, images=pixels(1), max_new_tokens=ANSWER)
    config = GenerationConfig(do_sample=True, max_new_tokens=ANSWER)
    cold = model.generate(ids, images=pixels(1), generation_config=config, temperature=1e-6)
    assert cold.tolist() == greedy.tolist()


def test_images_are_handed_on_to_the_next_step(model, ids):
    images, sizes = pixels(1), [(56, 56)]
    prepared = model.prepare_inputs_for_generation(ids, None, images=images, image_sizes=sizes)
    assert prepared["images"] is images and prepared["image_sizes"] is sizes
    assert "images" not in model.prepare_inputs_for_generation(ids)


class TestTheCachesNames:
    """transformers 5.24 renamed ``past_key_values`` to ``cache``: a name that goes unread decodes without a cache."""

    @pytest.mark.parametrize("layer", [0, 2])
    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_forward_takes_either(self, model, ids, name, layer):
        with torch.no_grad(), pruning(model, "otprune", ratio=0.3, layer=layer):
            said = model.generate(ids, images=pixels(1), max_new_tokens=4)
            arguments = {name: DynamicCache(config=model.config)}
            token = model(input_ids=ids, images=pixels(1), **arguments).logits[:, -1].argmax(-1)
            for expected in said[0].tolist():
                assert int(token) == expected
                token = model(input_ids=token[None], **arguments).logits[:, -1].argmax(-1)

    def test_both_at_once_are_refused(self, model, ids):
        cache = DynamicCache(config=model.config)
        with pytest.raises(ValueError, match="not as both"):
            model(input_ids=ids, cache=cache, past_key_values=cache)

    @pytest.mark.parametrize("layer", [0, 2])
    def test_a_third_name_is_refused(self, model, ids, layer):
        with (
            pruning(model, "otprune", ratio=0.3, layer=layer),
            pytest.raises(TypeError, match=r"`kv`.*allowed are cache"),
        ):
            model(input_ids=ids, images=pixels(1), kv=DynamicCache(config=model.config))
