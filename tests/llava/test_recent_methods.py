"""The methods of 2024 to 2026 against plain loops, written from the papers."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from llava.pruning import VisualTokens, kernels, pruning, select
from llava.pruning.methods import prunesid
from llava.pruning.methods.coverage import Coverage, facility_select
from llava.pruning.methods.dart import DART
from llava.pruning.methods.fastervlm import FasterVLM
from llava.pruning.methods.flowcut import FlowCut
from llava.pruning.methods.holov import HoloV
from llava.pruning.methods.mmr import MMR
from llava.pruning.methods.prunesid import PruneSID, principal_loadings
from llava.pruning.methods.scope import SCOPE
from llava.pruning.methods.vscan import VScan
from llava.pruning.schedule import kept_count, mean_fraction
from no_waiting import no_waiting
from tiny_llava import build, pixels, prompt
from tiny_methods import TWICE

SEEDS = range(6)


def tokens_of(seed: int, k: int, n: int = 40, width: int = 12, newlines: bool = False) -> VisualTokens:
    """An image of tokens in a few clusters, as those of images are, with what the methods read of the encoder."""
    draw = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(5, width, generator=draw)
    features = torch.randn(n, width, generator=draw) + centres[torch.randint(5, (n,), generator=draw)]
    seen = torch.ones(n, 1)
    if newlines:
        seen[7::8] = 0
    return VisualTokens(
        features[None],
        k,
        encoder_features=(torch.randn(1, n, 9, generator=draw) + 0.5) * seen,
        cls_attention=torch.rand(1, n, 3, generator=draw) * seen,
        received_attention=torch.rand(1, n, 1, generator=draw) * seen,
    )


def rows_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor[0].double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12)


def cosines(x: np.ndarray) -> np.ndarray:
    return np.array([[cosine(a, b) for b in x] for a in x])


def naive_coverage(x: np.ndarray, k: int) -> list[int]:
    distance = ((x[:, None] - x[None]) ** 2).sum(-1)
    kept: list[int] = []
    while len(kept) < k:
        costs = {j: distance[[*kept, j]].min(axis=0).sum() for j in range(len(x)) if j not in kept}
        kept.append(min(costs, key=lambda j: (costs[j], j)))
    return kept


def naive_dart(
    x: np.ndarray, keys: np.ndarray, spoken: np.ndarray, text_keys: np.ndarray, k: int, pivots: int
) -> list[int]:
    kept = sorted(range(len(x)), key=lambda i: (-np.abs(keys[i]).sum(), i))[:pivots]
    words = sorted(range(len(spoken)), key=lambda i: (-np.abs(text_keys[i]).sum(), i))[:pivots]
    asking = [x[i] for i in kept] + [spoken[i] for i in words]
    left = k - len(kept)
    for number, pivot in enumerate(asking):
        rest = [i for i in range(len(x)) if i not in kept]
        rest.sort(key=lambda i: (cosine(x[i], pivot), i))
        kept += rest[: left // len(asking) + (number < left % len(asking))]
    return kept


def naive_mmr(importance: np.ndarray, x: np.ndarray, k: int, balance: float) -> list[int]:
    importance = (importance - importance.min()) / (importance.max() - importance.min())
    kept = [int(importance.argmax())]
    while len(kept) < k:
        scores = {
            j: balance * importance[j] - (1 - balance) * max(cosine(x[j], x[i]) for i in kept)
            for j in range(len(x))
            if j not in kept
        }
        kept.append(max(scores, key=lambda j: (scores[j], -j)))
    return kept


def naive_scope(attention: np.ndarray, x: np.ndarray, k: int, alpha: float) -> list[int]:
    similarity = cosines(x)
    kept: list[int] = []
    while len(kept) < k:
        covered = [max([0.0, *(similarity[i, j] for j in kept)]) for i in range(len(x))]
        scores = {
            j: attention[j] ** alpha * sum(max(0.0, similarity[i, j] - covered[i]) for i in range(len(x)))
            for j in range(len(x))
            if j not in kept
        }
        kept.append(max(scores, key=lambda j: (scores[j], -j)))
    return kept


def naive_holov(attention: np.ndarray, x: np.ndarray, k: int, strips: int, weight: float) -> list[int]:
    similarity = cosines(x)
    members = [list(part) for part in np.array_split(np.arange(len(x)), strips)]
    score = np.zeros(len(x))
    for part in members:
        spread = np.array([np.var([similarity[i, j] for j in part if j != i]) if len(part) > 1 else 0 for i in part])
        scale = attention[part].mean() / spread.mean() if spread.mean() > 0 else 0
        score[part] = attention[part] + weight * scale * spread
    means = np.array([score[part].mean() for part in members])
    quota = np.floor(means / means.sum() * k).astype(int)
    ranked = [sorted((i for i in part if attention[i] > 0), key=lambda i: (-score[i], i)) for part in members]
    kept = [i for part, count in zip(ranked, quota, strict=True) for i in part[:count]]
    extra = 0
    while len(kept) < k:
        for strip in sorted(range(strips), key=lambda s: (-means[s], s)):
            if len(kept) < k and quota[strip] + extra < len(ranked[strip]):
                kept.append(ranked[strip][quota[strip] + extra])
        extra += 1
    return kept


def exact_loadings(x: np.ndarray, count: int) -> np.ndarray:
    values = 1 / (1 + np.exp(-x))
    values = values - values.mean(axis=1, keepdims=True)
    return np.abs(np.linalg.svd(values, full_matrices=False)[0][:, :count])


def naive_prunesid(x: np.ndarray, k: int, group_size: int) -> list[int]:
    loadings = exact_loadings(x, max(1, k // group_size))
    group, score = loadings.argmax(axis=1), loadings.max(axis=1)
    similarity, n = cosines(x), len(x)
    limit = 18 * k / n * similarity[np.triu_indices(n, 1)].mean()
    queues, distinct = [], []
    for number in range(loadings.shape[1]):
        ranked = sorted(np.flatnonzero(group == number).tolist(), key=lambda i: (-score[i], i))
        stay: list[int] = []
        for i in ranked:
            if all(similarity[i, j] <= limit for j in stay):
                stay.append(i)
        queues.append(stay + [i for i in ranked if i not in stay])
        distinct.append(len(stay))
    rest = k - sum(bool(queue) for queue in queues)
    cap = 5 * int(np.ceil(k / 64))
    quota = [
        min(cap, 1 + int(rest * count / sum(distinct))) if queue else 0
        for queue, count in zip(queues, distinct, strict=True)
    ]
    kept = [i for queue, count in zip(queues, quota, strict=True) for i in queue[:count]]
    extra = 0
    while len(kept) < k:
        for number in sorted(range(len(queues)), key=lambda g: (-distinct[g], g)):
            if len(kept) < k and quota[number] + extra < len(queues[number]):
                kept.append(queues[number][quota[number] + extra])
        extra += 1
    return kept


def naive_flowcut(attention: np.ndarray, content: np.ndarray | None, values: np.ndarray, k: int) -> list[int]:
    layers = attention.shape[1]
    left = [i for i in range(len(attention)) if attention[i].any()]
    cumulated: dict[int, float] = {}
    for layer in range(layers):
        paid = attention[left, layer] / attention[left, layer].sum()
        flow = paid if content is None else paid + content[left, layer] / content[left, layer].sum()
        scores = dict(zip(left, flow * values[left, layer], strict=True))
        cumulated = {i: (cumulated[i] + scores[i]) / 2 if layer else scores[i] for i in left}
        to_come = layers - 1 - layer
        if to_come % 2 or len(left) <= k:
            continue
        entropy = -(paid * np.log(paid)).sum() / np.log(len(left))
        drops = len(left) - k
        if to_come:
            drops = min(drops, max(0, round((len(left) - k) / np.sqrt(to_come) * (1 - entropy**2))))
        left = sorted(sorted(left, key=lambda i: (-cumulated[i], i))[: len(left) - drops])
    return left


def naive_vscan(local: np.ndarray, whole: np.ndarray, x: np.ndarray, k: int, side: int, windows: int):
    kept = sorted(range(len(x)), key=lambda i: (-whole[i], i))[: k - k // 2]
    queues = [
        sorted(
            (
                i
                for i in range(len(x))
                if (i // side * windows // side, i % side * windows // side) == (down, across) and i not in kept
            ),
            key=lambda i: (-local[i], i),
        )
        for down in range(windows)
        for across in range(windows)
    ]
    share, chosen = k // 2 // len(queues), []
    for queue in queues:
        chosen += queue[:share]
    turn = share
    while len(chosen) < k // 2:
        for queue in sorted(queues, key=lambda queue: -local[queue[0]] if queue else 1):
            if turn < len(queue) and len(chosen) < k // 2:
                chosen.append(queue[turn])
        turn += 1
    kept = sorted(kept + chosen)
    joined = {i: [x[i]] for i in kept}
    for i in range(len(x)):
        if i not in kept:
            joined[max(kept, key=lambda j: (cosine(x[i], x[j]), -j))].append(x[i])
    return kept, np.stack([np.mean(joined[i], axis=0) for i in kept])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [5, 13, 38])
class TestAgainstLoops:
    def test_coverage(self, seed, k):
        tokens = tokens_of(seed, k)
        assert Coverage().select(tokens)[0].tolist() == naive_coverage(rows_of(tokens.features), k)

    def test_dart(self, seed, k):
        tokens, draw = tokens_of(seed, k), torch.Generator().manual_seed(seed)
        x, nothing = rows_of(tokens.features), np.zeros((0, 12))
        found = DART(embeddings=True).select(tokens)[0].tolist()
        assert found == naive_dart(x, x, nothing, nothing, k, pivots=4)
        keys, states, words, word_keys = (torch.randn(1, n, 12, generator=draw) for n in (40, 40, 2 + seed, 2 + seed))
        texts = {"text_keys": tuple(word_keys), "text_states": tuple(words)}
        tokens = dataclasses.replace(tokens, keys=keys, states=states, **texts)
        expected = naive_dart(rows_of(states), rows_of(keys), rows_of(words), rows_of(word_keys), k, pivots=4)
        assert DART().select(tokens)[0].tolist() == expected

    def test_mmr(self, seed, k):
        tokens, balance = tokens_of(seed, k), (0.3, 0.5, 1.0)[seed % 3]
        x = rows_of(tokens.features)
        for source, importance in (
            ("norm", np.linalg.norm(x, axis=1)),
            ("cls", rows_of(tokens.cls_attention).mean(axis=1)),
            ("received", rows_of(tokens.received_attention)[:, 0]),
        ):
            found = MMR(importance=source, balance=balance).select(tokens)[0].tolist()
            assert found == naive_mmr(importance, x, k, balance)

    def test_scope(self, seed, k):
        tokens, alpha = tokens_of(seed, k, newlines=True), (0.5, 1.0, 2.0)[seed % 3]
        expected = naive_scope(
            rows_of(tokens.cls_attention).mean(axis=1), rows_of(tokens.encoder_features), min(k, 35), alpha
        )
        found = SCOPE(alpha=alpha).select(tokens)[0].tolist()
        assert found[: len(expected)] == expected
        assert sorted(found[35:]) == found[35:]  # newlines gain nothing, and come last

    def test_holov(self, seed, k):
        tokens, strips = tokens_of(seed, min(k, 35), newlines=True), (1, 3, 16)[seed % 3]
        attention = rows_of(tokens.cls_attention).mean(axis=1)
        expected = naive_holov(attention, rows_of(tokens.features), min(k, 35), strips, weight=0.09)
        assert sorted(HoloV(strips=strips).select(tokens)[0].tolist()) == sorted(expected)

    def test_prunesid(self, seed, k, monkeypatch):
        tokens = tokens_of(seed, k, width=40)
        x = rows_of(tokens.features)
        loadings = torch.from_numpy(exact_loadings(x, k // 4))[None]
        monkeypatch.setattr(prunesid, "principal_loadings", lambda features, count: loadings[..., :count])
        found = PruneSID().select(tokens)[0].tolist()
        assert sorted(found) == sorted(naive_prunesid(x, k, group_size=4))

    def test_fastervlm(self, seed, k):
        tokens = tokens_of(seed, k)
        for source, importance in (
            ("auto", rows_of(tokens.cls_attention).mean(axis=1)),
            ("received", rows_of(tokens.received_attention)[:, 0]),
        ):
            expected = sorted(range(40), key=lambda i: -importance[i])[:k]
            assert FasterVLM(importance=source).select(tokens)[0].tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [5, 13, 30])
class TestAgainstLoopsOverLayers:
    def test_flowcut(self, seed, k):
        draw = torch.Generator().manual_seed(seed)
        seen = (torch.arange(40) % 8 < 7).float()[None, :, None]
        attention = torch.randn(1, 40, 7, generator=draw).mul(2).softmax(dim=1) * seen
        content = torch.randn(1, 40, 7, generator=draw).softmax(dim=1) * seen
        values = torch.rand(1, 40, 7, generator=draw)
        fields = {"layer_cls_attention": attention, "cls_affinity": content, "value_norms": values}
        found = FlowCut(layers=7).select(VisualTokens(torch.zeros(1, 40, 3), k, **fields))[0].tolist()
        assert sorted(found) == naive_flowcut(rows_of(attention), rows_of(content), rows_of(values), k)
        received = VisualTokens(torch.zeros(1, 40, 3), k, received_attention=attention, value_norms=values)
        found = FlowCut(layers=7, importance="received").select(received)[0].tolist()
        assert sorted(found) == naive_flowcut(rows_of(attention), None, rows_of(values), k)

    def test_vscan(self, seed, k):
        tokens = tokens_of(seed, k, n=36)
        both = torch.rand(1, 36, 2, generator=torch.Generator().manual_seed(seed))
        kept = VScan(windows=2).reduce(dataclasses.replace(tokens, layer_cls_attention=both))
        local, whole = rows_of(both).T
        expected, merged = naive_vscan(local, whole, rows_of(tokens.features), k, side=6, windows=2)
        assert kept.indices[0].tolist() == expected
        # means of at most a few dozen float32 numbers
        np.testing.assert_allclose(rows_of(kept.features), merged, rtol=1e-5, atol=1e-5)


@pytest.fixture
def eager(tower):
    """A model whose attention can be read."""
    model = build(tower)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def test_dart_reads_the_keys_of_the_layer_before_and_the_text_after_the_image(eager):
    ids, images, text = prompt(5, 7)[None], pixels(1), slice(6 + 16, 6 + 16 + 7)
    states = eager(input_ids=ids, images=images, output_hidden_states=True).hidden_states
    decoder, visual = eager.get_model(), slice(6, 6 + 16)
    layer = decoder.layers[1]
    keys = layer.self_attn.k_proj(layer.input_layernorm(states[1]))[0].view(-1, 2, 12).double().numpy()
    angle = np.arange(len(keys))[:, None] / eager.config.rope_parameters["rope_theta"] ** (np.arange(6) / 6)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = keys[..., :6], keys[..., 6:]
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(len(keys), -1)
    x = rows_of(decoder.norm(states[2]))
    expected = naive_dart(x[visual], turned[visual], x[text], turned[text], k=12, pivots=4)
    with pruning(eager, "dart", ratio=0.75):
        eager(input_ids=ids, images=images)
        assert eager.latest_prefill.tokens_left(0).tolist() == sorted(expected)


@torch.no_grad()
def test_vscan_drops_again_by_what_the_last_token_attends_to_before_the_middle(eager):
    ids, images, ratio = prompt(5, 7)[None], pixels(1), 0.45
    with pruning(eager, "vscan", ratio=ratio, **TWICE):
        found = eager(input_ids=ids, images=images).logits
        kept, counts = eager.latest_prefill.tokens_left(0).tolist(), eager.visual_tokens_per_layer[0]
    first = ratio * 4 / (2 + 2 * 0.5)
    assert counts == (kept_count(16, first),) * 2 + (kept_count(16, first / 2),) * 2
    with pruning(eager, "vscan", ratio=first, local_layer=1):
        output = eager(input_ids=ids, images=images, output_hidden_states=True, output_attentions=True)
        entered = eager.latest_prefill.kept[0].tolist()
    paid = output.attentions[1][0, :, -1].mean(dim=0)[6 : 6 + counts[0]].tolist()
    stay = sorted(sorted(range(counts[0]), key=lambda i: (-paid[i], i))[: counts[2]])
    assert kept == [entered[i] for i in stay]
    columns = torch.tensor([*range(6), *(6 + i for i in stay), *range(6 + counts[0], 13 + counts[0])])
    hidden, decoder = output.hidden_states[2][:, columns], eager.get_model()
    causal = torch.full((len(columns), len(columns)), -torch.inf).triu(1)[None, None]
    for layer in decoder.layers[2:]:
        rotary = decoder.rotary_emb(hidden, position_ids=columns[None])
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary)
    torch.testing.assert_close(found, eager.lm_head(decoder.norm(hidden)), rtol=1e-4, atol=1e-4)


def test_the_mean_over_the_layers_of_vscans_two_drops_is_the_ratio():
    pruner = VScan(second_ratio=1 / 3)
    for layers, ratio in itertools.product((1, 2, 5, 32), (0.05, 0.111, 0.5, 0.8, 1.0)):
        schedule = pruner.schedule_for(ratio, None, layers)
        assert mean_fraction(schedule, layers) == pytest.approx(ratio)
        assert all(0 < fraction <= 1 for _, fraction in schedule)
    # the published budget of 64 tokens: 96 enter the decoder, and 32 are left from the middle on
    assert [(at, kept_count(576, part)) for at, part in pruner.schedule_for(64 / 576, None, 32)] == [(0, 96), (16, 32)]


def test_loadings_are_those_of_the_exact_components():
    values = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(values, full_matrices=False)
    values = left * 8 * 0.5 ** torch.arange(30) @ right  # a spectrum that falls: the components are well defined
    exact = torch.from_numpy(np.stack([exact_loadings(rows_of(one[None]), 4) for one in values])).float()
    # The subspace iteration has converged to some units in the last place of what float32 carries through it.
    torch.testing.assert_close(principal_loadings(values, 4), exact, rtol=0, atol=2e-3)


def test_coverage_serves_duplicates_with_one_token_and_breaks_ties_downwards():
    corners = torch.tensor([[0.0, 0], [8, 0], [0, 8], [8, 8]])
    features = corners.repeat_interleave(4, dim=0)
    order = Coverage().select(VisualTokens(features[None], 6))[0].tolist()
    assert sorted(index // 4 for index in order[:4]) == [0, 1, 2, 3] and order[0] == 0
    assert order[4:] == sorted(set(range(16)) - set(order[:4]))[:2]


@pytest.mark.parametrize("method", ["scope", "holov", "fastervlm"])
def test_what_ranks_by_attention_needs_a_model(method):
    with pytest.raises(ValueError, match="needs cls_attention"):
        select(torch.ones(9, 4), k=2, method=method)


@pytest.mark.parametrize(
    "pruner", [Coverage(), DART(embeddings=True), MMR(importance="norm"), SCOPE(), HoloV(), PruneSID()], ids=str
)
def test_no_step_makes_a_gpus_host_wait(pruner, monkeypatch):
    monkeypatch.setattr(kernels, "_ON_CPU", {})
    assert no_waiting(pruner.select, tokens_of(0, 11)).shape == (1, 11)


@pytest.mark.parametrize("kind", ["normal", "cosines", "duplicates", "zeros"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (30, 30), (200, 60)], ids=str)
def test_the_lazy_facility_location_is_the_plain_one(n, k, kind):
    draw = torch.Generator().manual_seed(n)
    x = torch.randint(-3, 4, (2, n, 6), generator=draw).float()  # small whole numbers: every sum is exact
    if kind == "duplicates":
        x[:, n // 2 :] = x[:, : n - n // 2]
    similarity = torch.zeros(2, n, n) if kind == "zeros" else x @ x.mT
    weight = torch.randint(0, 3, (2, n), generator=draw).float() if kind == "cosines" else None
    served = similarity.amin(dim=-1) if kind == "normal" else None
    plain = facility_select(
        similarity.double(), k, *(None if part is None else part.double() for part in (weight, served))
    )
    assert torch.equal(facility_select(similarity, k, weight, served), plain)
