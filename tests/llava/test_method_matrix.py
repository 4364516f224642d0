"""Every method in a model: one image, batches, several images, crops, rows of text; before the decoder and inside."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from llava.constants import IGNORE_INDEX
from llava.model.language_model.kv_cache import CACHE
from llava.pruning import PruningConfig, VisualTokens, available_methods, kept_count, kernels, pruning
from llava.pruning.registry import method_class
from llava.pruning.schedule import apportion
from llava.pruning.signals import SIGNALS
from llava.pruning.tokens import TokenGrid, crop_numbers
from tiny_llava import build, pad_rows, pixels, prompt
from tiny_methods import OPTIONS as TINY_OPTIONS
from tiny_methods import RATIOS, TWICE
from tiny_ocvtp import WIDTH
from tiny_trained import trained_networks

ALL = available_methods()
N, DEPTH = 16, 4

VARIANTS = {"vscan twice": ("vscan", TWICE), "dart before": ("dart", {"embeddings": True})}
"""Methods whose options decide where they work."""
OPTIONS = dict(TINY_OPTIONS)
SEVERAL = (*RATIOS, "vscan twice")
LAYERED = [
    (name, layer)
    for name in sorted(ALL)
    for layer in ([None] if name in SEVERAL else [L for L in (0, 1, 3) if method_class(name)().first_layer <= L])
]
LAYERED += [("vscan twice", None), ("dart before", 0)]
IDS = [f"{name}-{'own' if layer is None else layer}" for name, layer in LAYERED]


def switched(model, method, layer, ratio=None, **options):
    ratio = RATIOS.get(method, 0.3) if ratio is None else ratio
    name, own = VARIANTS.get(method, (method, OPTIONS.get(method, {})))
    return pruning(model, name, ratio=ratio, layer=layer, **own, **options)


@pytest.fixture(scope="module", autouse=True)
def pruner_for_the_tiny_tower(tmp_path_factory):
    OPTIONS.update(trained_networks(tmp_path_factory.mktemp("trained")))


def answer(model, ids, images, mask=None, **kwargs):
    settings = {"max_new_tokens": 4, "do_sample": False} | kwargs
    return model.generate(ids, images=images, attention_mask=mask, **settings).tolist()


@pytest.mark.parametrize(("method", "layer"), LAYERED, ids=IDS)
def test_ratio_one_is_the_unpruned_model_bit_for_bit(model, method, layer):
    ids, images = prompt(5, 7)[None], pixels(1)
    with torch.no_grad():
        unpruned = model(input_ids=ids, images=images).logits
        with switched(model, method, layer, ratio=1.0):
            assert torch.equal(model(input_ids=ids, images=images).logits, unpruned)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("method", "layer"), LAYERED, ids=IDS)
def test_a_batch_answers_what_its_rows_answer_alone(model, method, layer, side):
    """Rows with one, two and no images, in one batch, either padding."""
    rows = [prompt(3, 9, seed=1), prompt(6, 4, 5, seed=2), prompt(12, seed=3)]
    images = [pixels(1, seed=4), pixels(2, seed=5), pixels(1, seed=6)]
    ids, mask = pad_rows(rows, side)
    with switched(model, method, layer):
        batch = answer(model, ids, torch.cat(images), mask)
        assert len(model.visual_token_counts) == 3 and all(total == N for total, _ in model.visual_token_counts)
        alone = [answer(model, row[None], part)[0] for row, part in zip(rows, images, strict=True)]
    assert batch == alone


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("method", "layer"), LAYERED, ids=IDS)
def test_cached_decoding_is_recomputation_without_a_cache(tower, method, layer, attention):
    model = build(tower)
    model.set_attn_implementation(attention)
    ids, images = prompt(4, 6)[None], pixels(1)
    with switched(model, method, layer), torch.no_grad():
        generated = answer(model, ids, images)[0]
        for length in range(len(generated)):
            said = torch.tensor(generated[:length], dtype=torch.int64)
            whole = torch.cat([ids[0], said])[None]
            # As labels, what was said takes no part in choosing.
            labels = torch.cat([torch.full_like(ids[0], IGNORE_INDEX), said])[None]
            logits = model(input_ids=whole, labels=labels, images=images, use_cache=False).logits
            assert int(logits[0, -1].argmax()) == generated[length]


@pytest.mark.parametrize(("method", "layer"), LAYERED, ids=IDS)
def test_the_cache_holds_what_each_layer_is_said_to_see(model, method, layer):
    ids, images = prompt(4, 6)[None], pixels(1)
    cache = DynamicCache(config=model.config)
    with switched(model, method, layer), torch.no_grad():
        model(input_ids=ids, images=images, past_key_values=cache, use_cache=True)
    lengths = [cache.get_seq_length(depth) - 11 for depth in range(DEPTH)]
    assert tuple(lengths) == model.visual_tokens_per_layer[0]
    assert model.visual_token_counts == [(N, lengths[-1])]
    assert lengths[-1] < N


@pytest.mark.parametrize(
    ("method", "layer"), [("otprune", 0), ("otprune", 2), ("sparsevlm", None), ("fastv", 2), ("fitprune", None)]
)
def test_beams_of_a_batch_are_beams_of_its_rows(model, method, layer):
    rows, images = [prompt(3, 9, seed=1), prompt(6, 4, seed=2)], pixels(2)
    ids, mask = pad_rows(rows)
    with switched(model, method, layer):
        batch = answer(model, ids, images, mask, num_beams=3)
        alone = [answer(model, row[None], images[i : i + 1], num_beams=3)[0] for i, row in enumerate(rows)]
    assert batch == alone


@pytest.mark.parametrize(("method", "layer"), [("otprune", 0), ("otprune", 2), ("pyramiddrop", None)])
def test_generation_without_a_cache_and_with_sampling(model, method, layer):
    ids, images = prompt(3, 9)[None], pixels(1)
    with switched(model, method, layer):
        assert answer(model, ids, images, use_cache=False) == answer(model, ids, images)
        torch.manual_seed(7)
        first = answer(model, ids, images, do_sample=True, temperature=5.0)
        torch.manual_seed(7)
        assert answer(model, ids, images, do_sample=True, temperature=5.0) == first


@pytest.mark.parametrize(("method", "layer"), LAYERED, ids=IDS)
def test_crops_and_newlines_have_one_budget(anyres, method, layer):
    images = [pixels(3, seed=1), pixels(5, seed=2)]
    sizes = [(112, 56), (84, 112)]
    rows = [prompt(3, 5, seed=1), prompt(4, 4, seed=2)]
    ids, mask = pad_rows(rows)
    with switched(anyres, method, layer):
        batch = answer(anyres, ids, images, mask, image_sizes=sizes)
        counts = anyres.visual_token_counts
        alone = [
            answer(anyres, row[None], [image], image_sizes=[size])[0]
            for row, image, size in zip(rows, images, sizes, strict=True)
        ]
    assert batch == alone
    # 16 of the base view, and 4 x 8 or 8 x 6 patches with a newline a row
    assert [total for total, _ in counts] == [16 + 4 * 9, 16 + 8 * 7]
    if method not in SEVERAL:
        assert [kept for _, kept in counts] == [kept_count(total, 0.3) for total, _ in counts]


@pytest.mark.parametrize("method", [name for name in sorted(ALL) if name not in SEVERAL])
def test_per_crop_gives_every_crop_its_share(anyres, method):
    ids, images, size = prompt(3, 5)[None], [pixels(5, seed=2)], (84, 112)
    layer = method_class(method)().default_layer
    with torch.no_grad():
        layout = anyres.image_tokens(images, [size])[0].layout
        crops = crop_numbers(layout)
        with switched(anyres, method, layer, per_crop=True):
            anyres(input_ids=ids, images=images, image_sizes=[size])
            if layer == 0:
                index = anyres.latest_prefill.image_id[0]
                assert int((index == 0).sum()) == kept_count(len(crops), 0.3)
            else:
                origin = anyres.latest_prefill.left.source[0]
                kept = origin[(origin >= 4) & (origin < 4 + len(crops))] - 4
                found = crops[kept].bincount(minlength=5).tolist()
                assert found == apportion(kept_count(len(crops), 0.3), crops.bincount().tolist())


def test_per_crop_counts_are_the_apportioned_ones(anyres):
    with torch.no_grad(), pruning(anyres, "otprune", ratio=0.25, per_crop=True):
        image = anyres.image_tokens([pixels(5, seed=2)], [(84, 112)])[0]
        pruner = PruningConfig("otprune", 0.25, options={"per_crop": True}).build_pruner()
        crops = crop_numbers(image.layout)
        tokens = VisualTokens(image.features[None], 20, layout=image.layout, crops=crops[None])
        indices = pruner.indices(tokens)[0]
        alone = PruningConfig("otprune", 0.25).build_pruner()
        shares = apportion(20, crops.bincount().tolist())
        for crop, share in enumerate(shares):
            own = (crops == crop).nonzero().flatten()
            expected = own[alone.indices(VisualTokens(image.features[None, own], share))[0]]
            assert indices[crops[indices] == crop].tolist() == expected.tolist()
        assert (indices.diff() > 0).all()


def test_a_map_that_padding_was_cut_off_knows_its_crops():
    part = TokenGrid(rows=6, columns=3, newline="row", crop_side=4, top=1, left=2)
    # columns 2, 3 | 4 of a grid of crops four wide, rows 1 to 3 | 4 to 6
    expected = [[0, 0, 1, 1]] * 3 + [[2, 2, 3, 3]] * 3
    assert part.crops().view(6, 4).tolist() == expected
    assert part.is_newline().view(6, 4).tolist() == [[False, False, False, True]] * 6
    assert [(crop.rows, crop.columns, crop.newline) for crop in part.split()] == [
        (3, 2, "none"),
        (3, 1, "row"),
        (3, 2, "none"),
        (3, 1, "row"),
    ]
    assert [len(crop) for crop in part.split()] == part.crops().bincount().tolist()


@pytest.mark.parametrize("k", [0, 1, 7, 23, 40])
def test_shares_add_up_and_fit(k):
    sizes = [16, 3, 20, 1]
    shares = apportion(k, sizes)
    assert sum(shares) == k and all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    assert all(abs(share - k * size / 40) < 1 for share, size in zip(shares, sizes, strict=True))


class TestPositions:
    """Where what is kept stands for the rotary embedding."""

    KEPT = (0, 1, 2, 3)  # of first_k at 0.25

    def test_original_before_the_decoder_is_hiding_what_is_dropped(self, model):
        ids, images = prompt(5, 7)[None], pixels(1)
        with torch.no_grad():
            full = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)[4]
            mask = torch.ones(full.shape[:2], dtype=torch.int64)
            mask[0, 6 + len(self.KEPT) : 6 + N] = 0
            positions = torch.arange(full.shape[1])[None]
            hidden = model(inputs_embeds=full, attention_mask=mask, position_ids=positions).logits[0, mask[0] == 1]
            with pruning(model, "first_k", ratio=0.25, position_ids="original"):
                kept = model(input_ids=ids, images=images).logits[0]
        torch.testing.assert_close(kept, hidden, rtol=1e-4, atol=1e-4)

    def test_compact_before_the_decoder_has_no_gaps(self, model):
        ids, images = prompt(5, 7)[None], pixels(1)
        with torch.no_grad(), pruning(model, "first_k", ratio=0.25, position_ids="compact"):
            kept = model(input_ids=ids, images=images).logits
            embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)[4]
            plain = model(inputs_embeds=embeds, position_ids=torch.arange(embeds.shape[1])[None]).logits
        torch.testing.assert_close(kept, plain)

    @pytest.mark.parametrize("layer", [1, 2])
    @pytest.mark.parametrize("positions", ["auto", "original", "compact"])
    def test_inside_the_decoder_later_layers_see_them(self, model, positions, layer):
        """The layers run one by one over the kept hidden states, at the positions that the option names."""
        ids, images = prompt(5, 7)[None], pixels(1)
        decoder = model.get_model()
        with torch.no_grad():
            states = model(input_ids=ids, images=images, output_hidden_states=True).hidden_states
            kept = [*range(6), *(6 + i for i in self.KEPT), *range(6 + N, 13 + N)]
            places = torch.arange(len(kept)) if positions == "compact" else torch.tensor(kept)
            hidden = states[layer][:, kept]
            rotary = decoder.rotary_emb(hidden, position_ids=places[None])
            for block in decoder.layers[layer:]:
                mask = create_causal_mask(
                    config=model.config,
                    inputs_embeds=hidden,
                    attention_mask=None,
                    position_ids=torch.arange(len(kept))[None],
                    **{CACHE: None},
                )
                hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)
            expected = model.lm_head(decoder.norm(hidden))
            with pruning(model, "first_k", ratio=0.25, layer=layer, position_ids=positions):
                found = model(input_ids=ids, images=images).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("layer", [0, 2])
    @pytest.mark.parametrize("positions", ["original", "compact"])
    def test_decoding_goes_on_where_the_prompt_ended(self, model, positions, layer):
        rows, images = [prompt(3, 9, seed=1), prompt(6, 4, 5, seed=2)], pixels(3)
        ids, mask = pad_rows(rows)
        with pruning(model, "otprune", ratio=0.3, layer=layer, position_ids=positions):
            batch = answer(model, ids, images, mask)
            for row, own, generated in zip(rows, (images[:1], images[1:]), batch, strict=True):
                recomputed: list[int] = []
                for _ in generated:
                    longer = torch.cat([row, torch.tensor(recomputed, dtype=torch.int64)])[None]
                    with torch.no_grad():
                        logits = model(input_ids=longer, images=own, use_cache=False).logits
                    recomputed.append(int(logits[0, -1].argmax()))
                assert recomputed == generated

    def test_they_are_options_of_every_method(self):
        with pytest.raises(ValueError, match="OTPRUNE_POSITION_IDS=left: must be auto or original or compact"):
            PruningConfig.from_env({"BASELINE": "OTPRUNE", "SUBSET_RATIO": "0.1", "OTPRUNE_POSITION_IDS": "left"})


OF_LAYERS = ("received_attention", "layer_cls_attention", "cls_affinity", "value_norms")


def observed(kind: str, dtype: torch.dtype, batch: int, layout) -> dict:
    """Everything that a method may ask for, for ``sum(len)`` tokens of a layout."""
    n = sum(len(part) for part in layout)
    draw = torch.Generator().manual_seed(3)
    values = {
        "features": torch.randn(batch, n, 24, generator=draw),
        "encoder_features": torch.randn(batch, n, WIDTH, generator=draw),
        "encoder_keys": torch.randn(batch, n, 8, generator=draw),
        "final_keys": torch.randn(batch, n, 20, generator=draw),
        "cls_attention": torch.rand(batch, n, 4, generator=draw),
        **{name: torch.rand(batch, n, 2, generator=draw) for name in OF_LAYERS},
        "final_cls_attention": torch.rand(batch, n, generator=draw),
        "text_similarity": torch.rand(batch, n, generator=draw),
        "last_attention": torch.rand(batch, n, 4, generator=draw),
        "next_attention": torch.rand(batch, n, 4, generator=draw),
        "rater_attention": torch.rand(batch, n, generator=draw),
        "visual_attention": torch.rand(batch, n, generator=draw),
        "text_attention": torch.rand(batch, n, generator=draw),
        "layer_features": torch.randn(batch, n, WIDTH, generator=draw),
        "keys": torch.randn(batch, n, 12, generator=draw),
        "states": torch.randn(batch, n, 24, generator=draw),
    }
    for value in values.values():
        if kind == "duplicates":
            value[:, n // 2 : 2 * (n // 2)] = value[:, : n // 2]
        elif kind != "normal":
            value[:] = {"zeros": 0, "equal": 1.5}[kind]
    newlines = torch.cat([part.is_newline() for part in layout])
    encoded = ("encoder_features", "layer_features", "encoder_keys", "final_keys")
    for name in (*encoded, "cls_attention", *OF_LAYERS):
        values[name][:, newlines] = 0
    for name in ("features", *encoded):
        values[name] = values[name].to(dtype)
    question = tuple(torch.randn(5, 24, generator=draw).to(dtype) for _ in range(batch))
    lengths = [3 + 4 * (image % 2) for image in range(batch)]
    texts = {"text_keys": 12, "text_states": 24}
    return values | {
        **{
            name: tuple(torch.randn(length, width, generator=draw).to(dtype) for length in lengths)
            for name, width in texts.items()
        },
        "image_keys": tuple(range(batch)),
        "question": question,
        "layout": layout,
        "crops": crop_numbers(layout).expand(batch, -1),
    }


SQUARE = (TokenGrid(6, 6),)
CROPS = (TokenGrid(4, 4), TokenGrid(8, 7, "row", 4, 0, 0))


CASES = list(
    itertools.product(
        (torch.float32, torch.bfloat16, torch.float16),
        ("normal", "duplicates", "zeros", "equal"),
        (1, 3, 9, -1, 0),
        (SQUARE, CROPS),
        (False, True),
    )
)
"""dtype, kind of features, k (counted from N where it is not positive), layout, per_crop."""


@pytest.mark.parametrize("method", [name for name in sorted(ALL) if name != "vtw"])
def test_exactly_k_distinct_tokens_go_on(method, request):
    """Each image by itself, nothing changed, the same twice; on cases drawn by the method's name, more with --fuzz."""
    drawn = random.Random(method).sample(CASES, min(len(CASES), 24 * request.config.getoption("fuzz")))
    for dtype, kind, k, layout, per_crop in drawn:
        k = k if k > 0 else sum(len(part) for part in layout) + k
        pruner = method_class(method)(**OPTIONS.get(method, {}), per_crop=per_crop)
        fields = observed(kind, dtype, 2, layout)
        before = {name: value.clone() for name, value in fields.items() if isinstance(value, torch.Tensor)}
        kept = pruner.reduce(VisualTokens(**fields, k=k))
        assert kept.features.shape == (2, k, 24) and kept.features.dtype == dtype
        assert kept.features.isfinite().all()
        assert kept.indices.shape == (2, k) and all(len(set(row.tolist())) == k for row in kept.indices)
        if not pruner.merges:
            assert (kept.indices.diff(dim=1) > 0).all()
            gathered = torch.stack([x[i] for x, i in zip(fields["features"], kept.indices, strict=True)])
            assert torch.equal(kept.features, gathered)
        assert all(torch.equal(fields[name], value) for name, value in before.items())
        again = pruner.reduce(VisualTokens(**fields, k=k))
        assert torch.equal(again.indices, kept.indices) and torch.equal(again.features, kept.features)
        for image in range(2):
            own = {
                name: value[image : image + 1] if isinstance(value, torch.Tensor) or name != "layout" else value
                for name, value in fields.items()
            }
            alone = pruner.reduce(VisualTokens(**own, k=k))
            assert torch.equal(alone.indices[0], kept.indices[image]), (dtype, kind, k, layout, per_crop)
            torch.testing.assert_close(alone.features[0], kept.features[image])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("method", "options"),
    [(name, {}) for name in sorted(ALL) if name != "vtw"]
    + [("otprune", {"compat": True}), ("prumerge", {"adaptive": True}), ("prumerge_plus", {"adaptive": True})],
    ids=str,
)
def test_autocast_around_a_selection_changes_nothing(method, options, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_ON_CPU", {})  # the plain versions: NumPy knows nothing of autocast
    pruner = method_class(method)(**OPTIONS.get(method, {}) | options)
    tokens = VisualTokens(**observed("normal", dtype, 1, (TokenGrid(12, 12),)), k=70)
    kept = pruner.reduce(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = pruner.reduce(tokens)
    assert torch.equal(again.indices, kept.indices) and torch.equal(again.features, kept.features)


@pytest.mark.parametrize("method", sorted(ALL))
def test_what_a_method_ranks_by_must_be_finite(method):
    pruner = method_class(method)(**OPTIONS.get(method, {}))
    for name in sorted(need for need in pruner.needs if SIGNALS[need].per_token) or ["features"]:
        fields = observed("normal", torch.float32, 1, SQUARE)
        fields[name].view(-1)[5] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinite"):
            pruner.reduce(VisualTokens(**fields, k=4))


@pytest.mark.parametrize("method", sorted(ALL))
def test_what_the_model_does_not_give_is_named(method):
    pruner = method_class(method)(**OPTIONS.get(method, {}))
    if pruner.needs:
        with pytest.raises(ValueError, match=f"needs {min(pruner.needs)}"):
            pruner.reduce(VisualTokens(torch.ones(1, 9, 4), 3))
