"""VisionZip, VisPruner and HiPrune: the published selections, and what the published code gets wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch

from golden import golden_root
from llava.pruning import VisualTokens
from llava.pruning.methods.hiprune import HiPrune, anchors_buffers_registers, neighbours
from llava.pruning.methods.importance import most_important
from llava.pruning.methods.visionzip import VisionZip, contextual_tokens
from llava.pruning.methods.vispruner import VisPruner, remove_duplicates
from llava.pruning.similarity import cosine_similarity
from llava.pruning.tokens import TokenGrid, crop_numbers

FILE = golden_root() / "pruning" / "attention_methods.json"
GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {}
METHODS = [VisionZip, VisPruner, HiPrune]
TENSORS = ("features", "encoder_features", "encoder_keys", "cls_attention", "received_attention")
NEWLINES = (TokenGrid(4, 4), TokenGrid(3, 5, newline="row"))
"""34 tokens, of which 31 are patches."""


def golden_cases(method):
    return [pytest.param(case, id=case["key"]) for case in GOLDEN.get(method, [])]


def stored(case, name):
    return np.load(FILE.with_suffix(".npz"))[f"{case['key']}/{name}"]


def stored_mask(case):
    return torch.from_numpy(np.unpackbits(stored(case, "mask"), axis=-1)[:, :576]).bool()


def generator(method: int, case):
    return np.random.default_rng([GOLDEN["base_seed"], method, int(case["key"][-1])])


def float32(array, sha: str) -> torch.Tensor:
    array = np.ascontiguousarray(array, dtype=np.float32)
    assert hashlib.sha256(array.tobytes()).hexdigest() == sha
    return torch.from_numpy(array)


def cube(array):
    return array * array * array


def visionzip_inputs(case):
    """hidden (B, 577, D), metric (B, 577, 16) and the attention of [CLS] (B, 577, H) of a golden case."""
    draw = generator(2, case)
    hidden = float32(draw.standard_normal((case["B"], 577, case["D"])), case["sha_hidden"])
    metric = float32(draw.standard_normal((case["B"], 577, 16)), case["sha_metric"])
    cls = float32(cube(draw.random((case["B"], case["H"], 577))), case["sha_cls"])
    return hidden, metric, cls.mT


def vispruner_inputs(case):
    draw = generator(4, case)
    features = float32(draw.standard_normal((case["B"], 576, case["C"])), case["sha_f"])
    attention = float32(cube(draw.random((case["B"], case["H"], 576))), case["sha_att"])
    return features, attention.mT


def hiprune_inputs(case):
    """Attention that each patch receives in the object layer and in the deep layer, (B, 576, 2)."""
    draw = generator(5, case)
    shape = (case["B"], case["H"], 577, 577)
    deep = float32(cube(draw.random(shape)), case["sha_deep"])
    shallow = float32(cube(draw.random(shape)), case["sha_shallow"])
    return torch.stack([shallow.mean(dim=(1, 2)), deep.mean(dim=(1, 2))], dim=-1)[:, 1:]


def scene(batch=2, n=36, k=7, seed=0, dtype=torch.float32, layout=None, width=12):
    """Random tokens with everything that the three methods read; newlines have zeros, as from a vision tower."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    seen = torch.ones(n)
    if layout is not None:
        seen = (~torch.cat([part.is_newline() for part in layout])).float()
        n = len(seen)
    features = normal(batch, n, width)
    parts = {
        "encoder_features": (normal(batch, n, 10) * seen[:, None]).to(dtype),
        "encoder_keys": (normal(batch, n, 6) * seen[:, None]).to(dtype),
        "cls_attention": normal(batch, n, 3).softmax(dim=1) * seen[:, None],
        "received_attention": normal(batch, n, 2).softmax(dim=1) * seen[:, None],
    }
    return VisualTokens(features.to(dtype), k, layout=layout, **parts)


def row(tokens: VisualTokens, index: int) -> VisualTokens:
    parts = {name: getattr(tokens, name)[index : index + 1] for name in TENSORS}
    return VisualTokens(k=tokens.k, layout=tokens.layout, **parts)


# ---- published selections


@pytest.mark.parametrize("case", golden_cases("visionzip"))
def test_visionzip_merges_the_published_tokens_with_cls_among_them(case):
    hidden, metric, cls = visionzip_inputs(case)
    order = most_important(cls[:, 1:].mean(dim=-1)) + 1
    dominant = torch.cat([torch.zeros_like(order[:, :1]), order[:, : case["dominant_info"]]], dim=1)
    assert torch.equal(dominant, torch.from_numpy(stored(case, "all_indices")).long())
    rest = order[:, case["dominant_info"] :].sort(dim=1).values
    merged = torch.stack(
        [contextual_tokens(*image, case["contextual"])[0] for image in zip(hidden, metric, rest, strict=True)]
    )
    kept = dominant.sort(dim=1).values
    found = torch.cat([hidden[torch.arange(case["B"])[:, None], kept], merged], dim=1)
    # sums of at most a few dozen float32 values near 1, in another order
    torch.testing.assert_close(found, torch.from_numpy(stored(case, "tokens")), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", golden_cases("visionzip"))
def test_visionzip_is_the_published_one_less_cls(case):
    hidden, metric, cls = visionzip_inputs(case)
    k = case["dominant_info"] + case["contextual"]
    tokens = VisualTokens(hidden[:, 1:], k, encoder_keys=metric[:, 1:], cls_attention=cls[:, 1:])
    kept = VisionZip(contextual_share=case["contextual"] / k).reduce(tokens)
    published = torch.from_numpy(stored(case, "tokens"))[:, 1:]
    torch.testing.assert_close(kept.features, published, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", golden_cases("vispruner"))
def test_vispruner_keeps_the_published_tokens(case):
    features, attention = vispruner_inputs(case)
    tokens = VisualTokens(features, case["T"], encoder_features=features, cls_attention=attention)
    chosen = VisPruner(important_ratio=case["important_ratio"]).indices(tokens)
    if "error" in case:
        # the published code cannot deal an odd number of tokens into two halves
        assert chosen.shape == (case["B"], case["T"])
        assert chosen.tolist() == vispruner_by_hand(features, attention, case["T"], case["important_ratio"])
        return
    for image, mask in zip(chosen, stored_mask(case), strict=True):
        assert image.tolist() == mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("case", golden_cases("hiprune"))
def test_hiprune_with_the_published_neighbourhood_keeps_the_published_tokens(case):
    k = case["retention"] // case["B"]
    received = hiprune_inputs(case)
    tokens = VisualTokens(torch.zeros(case["B"], 576, 1), k, received_attention=received)
    chosen = HiPrune(alpha=case["alpha"], object_layer=case["object_layer"], compat=True).indices(tokens)
    for image, mask in zip(chosen, stored_mask(case), strict=True):
        assert image.tolist() == mask.nonzero().flatten().tolist()


# ---- VisionZip


@pytest.mark.parametrize(("k", "contextual"), [(64, 10), (128, 20), (192, 30), (32, 5), (1, 0)])
def test_visionzip_splits_the_budget_as_published(k, contextual):
    tokens = scene(batch=1, n=576, k=k)
    kept = VisionZip().reduce(tokens)
    order = tokens.cls_attention.sum(dim=-1)[0].argsort(descending=True)
    dominant = kept.indices[0, : k - contextual]
    assert dominant.tolist() == sorted(order[: k - contextual].tolist())
    assert torch.equal(kept.features[0, : k - contextual], tokens.features[0, dominant])


def test_visionzip_adds_to_a_target_the_mean_of_what_is_like_it():
    hidden = torch.tensor([[1.0], [10.0], [20.0], [100.0], [200.0], [7.0]])
    metric = torch.tensor([[1.0, 0], [0.9, 0.1], [0.1, 0.8], [0, 1.0], [0.2, 0.9], [1.0, 0]])
    merged, targets = contextual_tokens(hidden, metric, torch.arange(5), 2)
    assert targets.tolist() == [0, 2]
    # 1 points where 0 does, 3 and 4 where 2 does; 5 is dominant and joins nobody
    assert merged.tolist() == [[1.0 + 10.0], [20.0 + 150.0]]


def test_visionzip_keeps_duplicate_targets_apart():
    merged, targets = contextual_tokens(torch.ones(4, 2), torch.ones(4, 3), torch.arange(4), 2)
    assert targets.tolist() == [0, 2]
    assert merged.tolist() == [[2.0, 2.0], [1.0, 1.0]]


def test_visionzip_of_contextual_tokens_alone_needs_no_attention():
    tokens = scene(k=6)
    kept = VisionZip(contextual_share=1.0).reduce(tokens)
    assert kept.indices.tolist() == [list(range(0, 36, 6))] * 2


def test_visionzip_without_contextual_tokens_is_a_selection():
    tokens = scene(k=6)
    kept = VisionZip(contextual_share=0.0).reduce(tokens)
    assert torch.equal(kept.features, tokens.features[torch.arange(2)[:, None], kept.indices])


def test_visionzip_merges_no_newline_into_a_patch():
    """A newline has no key, so that its cosine with every target is the same."""
    layout = (TokenGrid(6, 6, newline="row"),)
    tokens = scene(k=8, layout=layout)
    newline = layout[0].is_newline()
    shouting = tokens.features.clone()
    shouting[:, newline] = 1e4
    kept = VisionZip(contextual_share=0.5).reduce(tokens)
    loud = VisionZip(contextual_share=0.5).reduce(dataclasses.replace(tokens, features=shouting))
    assert torch.equal(kept.features, loud.features)


# ---- VisPruner


def vispruner_by_hand(features, attention, k, ratio):
    """The definition for one image after the other, with lists."""
    kept = []
    for image, scores in zip(features, attention.mean(dim=-1), strict=True):
        cosine = cosine_similarity(image[None])[0].tolist()
        ranked = scores.argsort(descending=True, stable=True).tolist()
        important, left = ranked[: int(k * ratio)], ranked[int(k * ratio) :]
        while len(left) > k - len(important):
            even, odd = left[0::2], left[1::2]
            redundancy = {i: max(cosine[i][j] for j in odd) for i in even}
            removed = min(8, len(left) - (k - len(important)))
            left = sorted(even, key=redundancy.get, reverse=True)[removed:] + odd
        kept.append(sorted(important + left))
    return kept


@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.75])
@pytest.mark.parametrize(("n", "k"), [(35, 1), (36, 2), (37, 8), (50, 27), (41, 40)])
def test_vispruner_is_its_definition_for_even_and_odd_numbers(n, k, ratio):
    tokens = scene(n=n, k=k, seed=n)
    expected = vispruner_by_hand(tokens.encoder_features, tokens.cls_attention, k, ratio)
    assert VisPruner(important_ratio=ratio).indices(tokens).tolist() == expected


def test_vispruner_removes_a_duplicate_at_an_even_place():
    similarity = torch.eye(6)
    similarity[2, 1] = similarity[1, 2] = 1.0
    similarity[4, 5] = similarity[5, 4] = 0.5
    ranked = torch.arange(6)
    assert remove_duplicates(similarity, ranked, 5).tolist() == [4, 0, 1, 3, 5]
    assert remove_duplicates(similarity, ranked, 4).tolist() == [0, 1, 3, 5]


def test_vispruner_takes_no_newline_for_diversity():
    """Beside patches that are all alike, a newline without a feature would be the most diverse token of all."""
    tokens = scene(k=12, layout=NEWLINES)
    newline = torch.cat([part.is_newline() for part in NEWLINES])
    features = tokens.encoder_features + 100 * (~newline).float()[:, None]
    tokens = dataclasses.replace(tokens, encoder_features=features)
    assert not newline[VisPruner().indices(tokens)].any()


# ---- HiPrune


def received(n, objects, deep):
    """Attention (1, n, 2): the given tokens get more and more of it from last to first, the others a little."""
    attention = torch.full((1, n, 2), 1e-3)
    for layer, tokens in enumerate((objects, deep)):
        for place, token in enumerate(reversed(tokens)):
            attention[0, token, layer] = 0.1 * (place + 1)
    return attention


def hiprune(attention, k, layout=None, **options):
    tokens = VisualTokens(torch.zeros(1, attention.shape[1], 1), k, layout=layout, received_attention=attention)
    return HiPrune(**options).indices(tokens)[0].tolist()


def test_hiprune_keeps_an_anchor_its_four_buffers_and_registers():
    attention = received(36, objects=[14], deep=[35, 14, 0])
    assert hiprune(attention, 7, alpha=0.7) == sorted([14, 13, 15, 8, 20, 35, 0])


def test_hiprune_does_not_wrap_around_a_row_and_invents_no_corner():
    at_row_end = received(36, objects=[11], deep=[30, 31])
    assert hiprune(at_row_end, 6, alpha=0.9) == sorted([11, 10, 5, 17, 30, 31])
    in_the_last_row = received(36, objects=[33], deep=[1, 2])
    assert hiprune(in_the_last_row, 6, alpha=0.9) == sorted([33, 32, 34, 27, 1, 2])


def test_hiprune_compat_wraps_and_clamps():
    at_row_end = received(36, objects=[11], deep=[30, 31])
    assert hiprune(at_row_end, 6, alpha=0.9, compat=True) == sorted([11, 10, 12, 5, 17, 30])
    in_the_last_row = received(36, objects=[33], deep=[1, 2])
    assert hiprune(in_the_last_row, 6, alpha=0.9, compat=True) == sorted([33, 32, 34, 27, 35, 1])


def test_hiprune_reads_neighbours_from_the_layout():
    """Newlines are skipped, maps are not joined, and columns are those of the map."""
    table = neighbours(NEWLINES, 34)
    assert set(table[15].tolist()) == {15, 14, 11}  # the last patch of the 4 x 4 map
    assert set(table[16].tolist()) == {16, 17, 22}  # the first of the 3 x 5 map with a newline a row
    assert set(table[26].tolist()) == {20, 32, 25, 26}  # a row's end: the newline at 27 is no neighbour
    assert set(table[21].tolist()) == {21}  # a newline


def test_hiprune_counts_the_newlines_of_a_map_before_the_next_one():
    table = neighbours((TokenGrid(2, 3, newline="end"), TokenGrid(1, 2)), 9)
    assert table[6].tolist() == [6] * 4
    assert set(table[5].tolist()) == {5, 4, 2}
    assert set(table[7].tolist()) == {7, 8}


def test_hiprune_without_a_layout_takes_a_square_or_else_a_row():
    assert set(neighbours(None, 9)[4].tolist()) == {3, 5, 1, 7}
    assert set(neighbours(None, 10)[4].tolist()) == {3, 4, 5}


@pytest.mark.parametrize("k", [3, 4, 9])
def test_hiprune_fills_the_budget_with_anchors_then_buffers_and_never_exceeds_it(k):
    """At 3 of 3 the single anchor alone brings four buffers; at 9, two anchors bring eight."""
    anchors = [14, 28][: round(k / 5)]
    near = [[13, 15, 8, 20], [27, 29, 22, 34]]
    attention = received(36, objects=[14, 28, 20, 34, 8, 22, 15, 29, 13, 27], deep=[])
    chosen = hiprune(attention, k, alpha=1.0)
    assert len(chosen) == k and set(anchors) <= set(chosen)
    assert set(chosen) <= set(anchors).union(*near[: len(anchors)])
    best = [token for token in (20, 34, 8, 22, 15, 29, 13, 27) if token in set().union(*near[: len(anchors)])]
    assert set(chosen) == set(anchors + best[: k - len(anchors)])


def test_hiprune_without_anchors_is_the_deep_layer_alone():
    attention = received(36, objects=[1, 2, 3], deep=[30, 20, 10])
    assert hiprune(attention, 3, alpha=0.0) == [10, 20, 30]


def test_hiprune_asks_for_its_object_layer_and_the_deepest_one():
    assert HiPrune().encoder_layers == (8, -1)
    assert HiPrune(object_layer=4).encoder_layers == (3, -1)


def test_hiprune_keeps_small_differences_of_attention_apart():
    """Attention differs by 1e-9 where hundreds of tokens share it: a rank added to it would swallow that."""
    deep = torch.full((1, 16), 1e-3)
    deep[0, 5:] += torch.arange(11) * 1e-9
    chosen = anchors_buffers_registers(torch.zeros(1, 16), deep, neighbours(None, 16), anchors=0, k=3)
    assert chosen.tolist() == [[15, 14, 13]]


# ---- what holds for all three


@pytest.mark.parametrize("known", [True, False], ids=["layout", "no-layout"])
@pytest.mark.parametrize("method", METHODS)
def test_newlines_go_on_only_when_every_patch_does(method, known):
    newline = torch.cat([part.is_newline() for part in NEWLINES])
    for k in (1, 12, 31, 32, 33):
        tokens = scene(k=k, layout=NEWLINES)
        chosen = method().indices(tokens if known else dataclasses.replace(tokens, layout=None))
        assert newline[chosen].sum(dim=1).tolist() == [max(0, k - 31)] * 2


@pytest.mark.parametrize("method", METHODS)
def test_images_of_a_batch_may_have_their_newlines_at_other_places(method):
    """34 tokens each, of which 32 and 31 are patches."""
    wide = (TokenGrid(4, 4), TokenGrid(2, 8, newline="row"))
    tall = (TokenGrid(4, 4), TokenGrid(3, 5, newline="row"))
    images = [scene(batch=1, k=20, layout=layout, seed=seed) for seed, layout in enumerate((wide, tall))]
    images = [dataclasses.replace(image, layout=None) for image in images]
    both = VisualTokens(k=20, **{name: torch.cat([getattr(image, name) for image in images]) for name in TENSORS})
    kept = method().reduce(both)
    for index, image in enumerate(images):
        alone = method().reduce(image)
        assert torch.equal(kept.indices[index], alone.indices[0])
        assert torch.equal(kept.features[index], alone.features[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_crop_chooses_as_if_it_were_alone(method):
    layout = (TokenGrid(4, 4), TokenGrid(4, 4), TokenGrid(4, 4))
    crops = crop_numbers(layout).expand(2, -1)
    tokens = dataclasses.replace(scene(k=12, layout=layout), crops=crops)
    kept = method(per_crop=True).reduce(tokens)
    for image in range(2):
        for crop in range(3):
            places = torch.arange(16 * crop, 16 * crop + 16)
            alone = places[method().reduce(tokens.at(image, places, 4)).indices]
            assert [i for i in kept.indices[image].tolist() if i // 16 == crop] == alone[0].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_ties_go_to_the_lowest_index(method):
    tokens = VisualTokens(
        torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0)),
        3,
        encoder_features=torch.ones(1, 9, 4),
        encoder_keys=torch.ones(1, 9, 4),
        cls_attention=torch.ones(1, 9, 2),
        received_attention=torch.ones(1, 9, 2),
    )
    options = {VisionZip: {"contextual_share": 0.0}, VisPruner: {"important_ratio": 1.0}, HiPrune: {}}[method]
    assert method(**options).indices(tokens).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (VisionZip, {"contextual_share": -0.1}, "contextual_share must be a number from 0 to 1, not -0.1"),
        (VisionZip, {"contextual_share": float("nan")}, "not nan"),
        (VisPruner, {"important_ratio": 1.5}, "important_ratio must be a number from 0 to 1, not 1.5"),
        (HiPrune, {"alpha": 2.0}, "alpha must be a number from 0 to 1, not 2.0"),
        (HiPrune, {"object_layer": 0}, "object_layer must be a layer of the encoder, counted from 1, not 0"),
    ],
)
def test_an_option_out_of_range_is_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)
