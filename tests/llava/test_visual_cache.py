"""Images are encoded once: same answers, fewer encodings, a bounded memory."""

from __future__ import annotations

import pytest
import torch

from llava.model.visual_cache import Span, VisualCache
from llava.pruning import pruning
from tiny_llava import build, pad_rows, pixels, prompt


def span(k: int, value: float = 0.0) -> Span:
    return Span(torch.full((k, 4), value), torch.arange(k), 10)


class TestCache:
    def test_what_was_put_is_there(self):
        cache = VisualCache(10**6)
        cache.put("a", span(3, 1.5))
        assert cache.get("a").features[0, 0] == 1.5 and cache.get("b") is None
        assert (cache.hits, cache.misses, len(cache)) == (1, 1, 1)

    def test_the_least_recently_used_leaves(self):
        size = span(3).nbytes
        cache = VisualCache(2 * size)
        cache.put("a", span(3))
        cache.put("b", span(3))
        cache.get("a")
        cache.put("c", span(3))
        assert cache.get("b") is None and cache.get("a") is not None and cache.get("c") is not None
        assert cache.nbytes == 2 * size

    def test_bytes_are_never_exceeded(self):
        cache = VisualCache(500)
        for number in range(20):
            cache.put(number, span(1 + number % 9))
            assert cache.nbytes <= 500
        cache.put("large", span(100))
        assert cache.get("large") is None

    def test_a_key_put_twice_counts_once(self):
        cache = VisualCache(10**6)
        cache.put("a", span(3))
        cache.put("a", span(5))
        assert len(cache) == 1 and cache.nbytes == span(5).nbytes
        cache.clear()
        assert len(cache) == 0 and cache.nbytes == 0

    def test_a_row_does_not_keep_its_batch_alive(self):
        cache = VisualCache(10**6)
        batch = torch.zeros(8, 3, 4)
        cache.put("a", Span(batch[2], torch.arange(3), 10))
        assert cache.get("a").features.untyped_storage().nbytes() == batch[2].nbytes

    def test_less_than_nothing_is_refused(self):
        with pytest.raises(ValueError, match="cannot hold -1 bytes"):
            VisualCache(-1)


@pytest.fixture
def model(tower):
    model = build(tower)
    model.encoded = 0
    encode = type(model)._encode_and_observe

    def counting(images):
        model.encoded += len(images)
        return encode(model, images)

    model._encode_and_observe = counting
    return model


def answers(model, rows, images):
    ids, mask = pad_rows(rows)
    return model.generate(ids, images=images, attention_mask=mask, max_new_tokens=4, do_sample=False).tolist()


@pytest.mark.parametrize("method", [None, "otprune", "random", "visionzip"])
def test_answers_are_the_same_and_each_image_is_encoded_once(model, method):
    """Five questions about two images, one of them in a row of two."""
    images = pixels(2)
    rows = [prompt(3, 9, seed=1), prompt(6, 4, 5, seed=2), prompt(2, 8, seed=3)]
    batch = torch.cat([images[:1], images, images[1:]])

    def ask():
        return [answers(model, rows, batch), answers(model, rows[:1], images[1:])]

    if method is None:
        plain = ask()
        model.visual_cache = VisualCache(10**7)
        cached, again = ask(), ask()
    else:
        with pruning(model, method, ratio=0.3):
            plain = ask()
            model.visual_cache = VisualCache(10**7)
            model.encoded = 0
            cached, again = ask(), ask()
            assert model.encoded == 2
            counts = model.visual_token_counts
            assert counts == [(16, 5)]
    assert plain == cached == again
    assert (model.visual_cache.hits, model.visual_cache.misses) == (8, 2)


def test_another_configuration_has_entries_of_its_own(model):
    images, rows = pixels(1), [prompt(3, 9)]
    model.visual_cache = VisualCache(10**7)
    for ratio in (0.2, 0.4, 0.2):
        with pruning(model, "otprune", ratio=ratio):
            answers(model, rows, images)
    assert len(model.visual_cache) == 2 and model.visual_cache.hits == 1


@pytest.mark.parametrize(("method", "layer"), [("fastv", 2), ("otprune", 1)])
def test_what_depends_on_more_than_the_image_is_not_remembered(model, method, layer):
    model.visual_cache = VisualCache(10**7)
    with pruning(model, method, ratio=0.3, layer=layer):
        answers(model, [prompt(3, 9)], pixels(1))
    with pruning(model, "cdpruner", ratio=0.3, relevance="embeddings"):
        answers(model, [prompt(3, 9)], pixels(1))
    assert len(model.visual_cache) == 0 and model.visual_cache.misses == 0


def test_gradients_reach_the_projector_all_the_same(model):
    model.visual_cache = VisualCache(10**7)
    ids = prompt(3, 9)[None]
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids.where(ids > 0, -100), images=pixels(1)).loss.backward()
        assert model.get_model().mm_projector[0].weight.grad.abs().sum() > 0
    assert len(model.visual_cache) == 0


def test_sizes_may_be_lists(model):
    """As JSON and other data sets give them."""
    model.visual_cache = VisualCache(10**7)
    ids, mask = pad_rows([prompt(3, 9, seed=1)])
    for sizes in ([[16, 16]], [(16, 16)], torch.tensor([[16, 16]])):
        model.generate(ids, images=pixels(1), image_sizes=sizes, attention_mask=mask, max_new_tokens=1, do_sample=False)
    assert (model.visual_cache.hits, model.visual_cache.misses) == (2, 1)
