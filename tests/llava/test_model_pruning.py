"""A pruned LLaVA: what is dropped, where, and what stays the same."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.visual_cache import VisualCache
from llava.pruning import PruningConfig, pruning, select
from tiny_llava import build, pad_rows, pixels, prompt

N = 16
LAYERS = (0, 1, 3)


def logits_of(model, ids, images, mask=None, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, images=images, attention_mask=mask, **kwargs).logits


def test_before_the_decoder_the_selected_features_stand_where_the_image_stood(model):
    ids, images = prompt(5, 7)[None], pixels(1)
    features = model.encode_images(images)[0].detach()
    with pruning(model, "otprune", ratio=0.25):
        _, _, _, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)
    text = model.get_model().embed_tokens(torch.cat([ids[0, :6], ids[0, 7:]]))
    chosen = features[select(features, ratio=0.25)]
    torch.testing.assert_close(embeds[0], torch.cat([text[:6], chosen, text[6:]]), rtol=0, atol=0)
    assert model.visual_token_counts == [(N, 4)]


def test_labels_are_pruned_with_the_embeddings(model):
    ids, images = prompt(5, 7)[None], pixels(1)
    with pruning(model, "uniform", ratio=0.25):
        _, _, _, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, ids, images)
    assert labels.shape == embeds.shape[:2]
    assert labels[0].tolist() == [*ids[0, :6].tolist(), *[-100] * 4, *ids[0, 7:].tolist()]


@pytest.mark.parametrize("layer", LAYERS)
def test_the_loss_is_that_of_the_row_without_padding(model, layer):
    rows = [prompt(3, 9, seed=1), prompt(6, 4, 5, seed=2)]
    ids, mask = pad_rows(rows)
    images = pixels(3)
    labels = ids.where(mask & (ids > 0), -100)
    with pruning(model, "otprune", ratio=0.3, layer=layer), torch.no_grad():
        both = model(input_ids=ids, labels=labels, images=images, attention_mask=mask).loss
        alone = [
            model(input_ids=row[None], labels=row[None].where(row[None] > 0, -100), images=part).loss
            for row, part in zip(rows, (images[:1], images[1:]), strict=True)
        ]
    predicted = [int((row[1:] > 0).sum()) for row in rows]
    mean = sum(loss * count for loss, count in zip(alone, predicted, strict=True)) / sum(predicted)
    torch.testing.assert_close(both, mean, rtol=1e-5, atol=1e-5)


def test_padding_is_found_without_a_mask(model):
    rows = [prompt(3, 9, seed=1), prompt(6, 4, seed=2)]
    ids, mask = pad_rows(rows)
    images = pixels(2)
    with_mask = model.generate(ids, images=images, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, images=images, max_new_tokens=4, do_sample=False), with_mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", LAYERS)
def test_cached_decoding_is_recomputation_from_scratch(tower, attention, layer):
    """The method matrix has the same on a Llama."""
    model = build(tower, "mistral")
    model.set_attn_implementation(attention)
    ids, images = prompt(4, 6)[None], pixels(1)
    with pruning(model, "otprune", ratio=0.3, layer=layer):
        generated = model.generate(ids, images=images, max_new_tokens=5, do_sample=False)[0].tolist()
        recomputed: list[int] = []
        for _ in range(5):
            longer = torch.cat([ids[0], torch.tensor(recomputed, dtype=torch.int64)])[None]
            recomputed.append(int(logits_of(model, longer, images, use_cache=False)[0, -1].argmax()))
    assert generated == recomputed


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_cache_holds_fewer_entries_from_the_layer_on(model, layer):
    ids, images = prompt(4, 6)[None], pixels(1)
    cache = DynamicCache(config=model.config)
    with pruning(model, "otprune", ratio=0.25, layer=layer):
        logits_of(model, ids, images, past_key_values=cache, use_cache=True)
    lengths = [cache.get_seq_length(depth) for depth in range(4)]
    assert lengths == [11 + N] * layer + [11 + 4] * (4 - layer)


def test_layers_below_the_drop_see_every_token(model):
    ids, images = prompt(4, 6)[None], pixels(1)
    with torch.no_grad():
        full = model(input_ids=ids, images=images, output_hidden_states=True).hidden_states
        with pruning(model, "first_k", ratio=0.25, layer=2):
            pruned = model(input_ids=ids, images=images, output_hidden_states=True).hidden_states
    for depth in (0, 1):
        torch.testing.assert_close(pruned[depth], full[depth], rtol=0, atol=0)
    kept = [*range(5), *range(5, 9), *range(5 + N, 11 + N)]
    torch.testing.assert_close(pruned[2], full[2][:, kept], rtol=0, atol=0)
    assert pruned[3].shape[1] == len(kept)


@pytest.mark.parametrize("layer", LAYERS)
def test_beams_and_several_return_sequences(model, layer):
    ids, images = prompt(4, 6)[None], pixels(1)
    with pruning(model, "otprune", ratio=0.3, layer=layer):
        out = model.generate(ids, images=images, max_new_tokens=4, do_sample=False, num_beams=3, num_return_sequences=2)
        single = model.generate(ids, images=images, max_new_tokens=4, do_sample=False, num_beams=3)
    assert out.shape == (2, 4) and out[0].tolist() == single[0].tolist()


@pytest.mark.parametrize("layer", LAYERS)
def test_random_depends_on_the_image_and_not_on_its_batch(model, layer):
    images, row = pixels(3), prompt(4, 6)
    with pruning(model, "random", ratio=0.3, layer=layer):
        batch = logits_of(model, torch.stack([row] * 3), images)
        alone = torch.cat([logits_of(model, row[None], images[i : i + 1]) for i in range(3)])
    with pruning(model, "random", ratio=0.3, layer=layer, seed=1):
        other = logits_of(model, torch.stack([row] * 3), images)
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batch, other, atol=1e-2)


def test_a_text_only_batch_is_left_alone(model):
    ids = torch.stack([prompt(8, seed=1), prompt(8, seed=2)])
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    for layer in LAYERS:
        with pruning(model, "otprune", ratio=0.1, layer=layer):
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain)


def test_features_that_are_not_finite_are_refused(model):
    images = pixels(1).fill_(float("nan"))
    with pruning(model, "otprune", ratio=0.1), pytest.raises(ValueError, match="NaN or infinite"):
        logits_of(model, prompt(4, 6)[None], images)


def test_too_few_images_say_how_many_are_missing(model):
    with pytest.raises(IndexError, match=r"take 2 images.*only 1 came"):
        logits_of(model, prompt(2, 3, 4)[None], pixels(1))


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("ids", "images", "sizes", "error", "said"),
    [
        (prompt(2, 3), None, None, IndexError, r"have 1 image mark \(-200\), but no images came"),
        (prompt(2, 3, 4), None, None, IndexError, "have 2 image marks .* but no images came"),
        (prompt(2, 3), pixels(1)[0], None, ValueError, r"not a tensor \(3, 56, 56\): one image is images\[None\]"),
        (prompt(2, 3), pixels(1)[0, 0], None, ValueError, r"not a tensor \(56, 56\)$"),
        (prompt(2, 3), [pixels(1)[0, 0]], None, ValueError, r"image 0 is \(56, 56\)"),
        (prompt(2, 3), ["cat.png"], None, ValueError, "image 0 is str"),
        (prompt(2, 3, 4), pixels(2, 5), [(84, 112)], ValueError, r"image_sizes holds 1 sizes .* but 2 images came"),
        (prompt(2, 3, 4), list(pixels(2, 5)), [(84, 112)], ValueError, "image_sizes holds 1 sizes"),
        (prompt(2, 3), pixels(1, 5), None, ValueError, "image_sizes is needed"),
    ],
)
def test_prompts_and_images_that_do_not_go_together_are_named(anyres, call, ids, images, sizes, error, said):
    with pytest.raises(error, match=said):
        getattr(anyres, call)(ids[None], images=images, image_sizes=sizes)


def test_a_mark_alone_is_no_prompt(model):
    with pytest.raises(IndexError, match="text has to stand beside it"):
        model.generate(prompt(0, 0)[None, 1:], images=pixels(1), max_new_tokens=1)


def test_sizes_that_nobody_needs_are_not_counted(model):
    model.visual_cache = VisualCache(1000)
    try:
        with torch.no_grad():
            out = model(prompt(2, 3, 4)[None], images=pixels(2), image_sizes=[(56, 56)]).logits
    finally:
        model.visual_cache = None
    torch.testing.assert_close(out, logits_of(model, prompt(2, 3, 4)[None], pixels(2)))


@pytest.mark.parametrize("pieces", [(2, 3), (6,)], ids=["one mark", "no mark"])
def test_surplus_images_of_several_prompts_are_refused(model, pieces):
    """Taken in order, the second row would see an image that may be the first one's."""
    ids = torch.stack([prompt(2, 3), prompt(*pieces)])
    assert logits_of(model, ids, pixels(2)) is not None
    with pytest.raises(ValueError, match="3 images came, but the prompts take 2"):
        logits_of(model, ids, pixels(3))


def test_surplus_images_of_one_prompt_are_ignored(model):
    ids, images = prompt(4, 6)[None], pixels(3)
    torch.testing.assert_close(logits_of(model, ids, images), logits_of(model, ids, images[:1]), rtol=1e-5, atol=1e-5)


def test_the_environment_is_read_when_the_model_is_built_and_never_again(tower, monkeypatch):
    monkeypatch.setenv("BASELINE", "OURS")
    monkeypatch.setenv("SUBSET_RATIO", "0.25")
    built = build(tower)
    assert built.pruning == PruningConfig(method="otprune", ratio=0.25).for_width(built.config.hidden_size)
    monkeypatch.setenv("SUBSET_RATIO", "0.5")
    logits_of(built, prompt(4, 6)[None], pixels(1))
    assert built.visual_token_counts == [(N, 4)]


def test_a_layer_beyond_the_decoder_is_refused(tower, monkeypatch):
    monkeypatch.setenv("BASELINE", "OURS")
    monkeypatch.setenv("SUBSET_RATIO", "0.25")
    monkeypatch.setenv("LAYER_INDEX", "4")
    with pytest.raises(ValueError, match=r"LAYER_INDEX=4.*4 layers.*0 to 3"):
        build(tower)


def test_a_replaced_splice_takes_effect(model, monkeypatch):
    """Other packages patch the mixin, and forward and generate must reach the patch."""
    calls = []
    original = LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal

    def patched(self, *args, **kwargs):
        calls.append("prepare")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlavaMetaForCausalLM, "prepare_inputs_labels_for_multimodal", patched)
    logits_of(model, prompt(4, 6)[None], pixels(1))
    model.generate(prompt(4, 6)[None], images=pixels(1), max_new_tokens=1)
    assert calls[:2] == ["prepare", "prepare"]


def test_the_encoder_is_where_published_pruning_code_looks_for_it(model):
    layers = model.get_vision_tower().vision_tower.vision_model.encoder.layers
    seen = []
    handle = layers[0].register_forward_hook(lambda *_: seen.append(True))
    model.encode_images(pixels(1))
    handle.remove()
    assert seen == [True]


def test_max_length_alone_counts_new_tokens_as_it_used_to(model):
    out = model.generate(prompt(4, 6)[None], images=pixels(1), max_length=4, do_sample=False)
    assert out.shape == (1, 3)


def test_input_ids_is_another_name_for_inputs(model):
    ids, images = prompt(4, 6)[None], pixels(1)
    named = model.generate(input_ids=ids, images=images, max_new_tokens=3, do_sample=False)
    assert torch.equal(named, model.generate(ids, images=images, max_new_tokens=3, do_sample=False))


def test_half_precision_images_are_taken_by_a_float32_model(model):
    out = model.generate(prompt(4, 6)[None], images=pixels(1).half(), max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 2)
