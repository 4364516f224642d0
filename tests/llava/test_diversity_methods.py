"""DivPrune and DPP against the published selections."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from golden import golden_root
from golden_features import load_features
from llava.model.llava_arch import greedy_select
from llava.pruning import VisualTokens, select
from llava.pruning.methods.divprune import DivPrune, max_min_select

ROOT = golden_root() / "pruning"
META = json.loads((ROOT / "selection_meta.json").read_text())
RATIOS = ("0.05", "0.098", "0.15", "0.2", "0.5", "1.0")


def keys(method: str, dtype: str) -> list[str]:
    return [key for key in META[method] if key.endswith(f"/{dtype}")]


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def divprune():
    return np.load(ROOT / "divprune_selection.npz")


@pytest.fixture(scope="module")
def dpp():
    return np.load(ROOT / "dpp_selection.npz")


@pytest.mark.parametrize("key", keys("divprune", "float32"))
def test_divprune_takes_the_published_tokens_in_the_published_order(key, divprune):
    features = load_features(ROOT, key.rsplit("/", 1)[0])
    for ratio in RATIOS:
        expected = divprune[f"{key}/r{ratio}/order"].astype(int).tolist()
        if len(expected) == len(features):
            continue
        order = DivPrune().select(VisualTokens(features[None], len(expected)))[0].tolist()
        margins = divprune[f"{key}/margin_full"][: len(expected)]
        # below 1e-6 the order hangs on the rounding of a float32 product; there the published code repeats duplicates
        stable = int(np.argmax(margins < 1e-6)) if (margins < 1e-6).any() else len(expected)
        assert order[:stable] == expected[:stable]
        assert len(set(order)) == len(order)
        similarity = unit_rows(features) @ unit_rows(features).T
        chosen = similarity[order][:, order].fill_diagonal_(-1)
        best = similarity[expected][:, expected].fill_diagonal_(-1)
        if len(set(expected)) == len(expected):
            assert chosen.max() <= best.max() + 1e-5


@pytest.mark.parametrize("key", keys("divprune", "float64"))
def test_max_min_in_float64_is_the_published_order_to_the_end(key, divprune):
    features = load_features(ROOT, key.rsplit("/", 1)[0], "float64")
    distance = (1 - unit_rows(features) @ unit_rows(features).T)[None]
    for ratio in RATIOS:
        expected = divprune[f"{key}/r{ratio}/order"].astype(int).tolist()
        margins = divprune[f"{key}/margin_full"][: len(expected)]
        stable = int(np.argmax(margins < 1e-9)) if (margins < 1e-9).any() else len(expected)
        assert max_min_select(distance, len(expected))[0, :stable].tolist() == expected[:stable]


@pytest.mark.parametrize("key", keys("dpp", "float64"))
def test_dpp_in_float64_is_the_published_order_while_it_means_something(key, dpp):
    features = load_features(ROOT, key.rsplit("/", 1)[0], "float64")
    kernel = unit_rows(features) @ unit_rows(features).T
    for ratio in RATIOS:
        expected = dpp[f"{key}/r{ratio}/order"].astype(int).tolist()
        # every diagonal entry is 1 up to rounding: start where the published code happened to start
        kernel.fill_diagonal_(1)
        kernel[expected[0], expected[0]] += 1e-12
        stable = min(META["dpp"][key]["reliable_prefix"], len(expected))
        assert greedy_select(kernel, len(expected))[:stable].tolist() == expected[:stable]


@pytest.mark.parametrize("key", keys("dpp", "float32"))
def test_dpp_in_float32_is_as_good_as_the_published_choice(key, dpp):
    """From the same first token: another one changes the greedy value by a few per cent.

    The kernel's diagonal keeps its rounding errors here, which decide between nearly orthogonal tokens.
    """
    features = load_features(ROOT, key.rsplit("/", 1)[0])
    exact = unit_rows(features.double()) @ unit_rows(features.double()).T
    for ratio, facts in META["dpp"][key]["ratios"].items():
        k = facts["k_within_rank"]
        if k < 2:
            continue
        kernel = unit_rows(features) @ unit_rows(features).T
        first = int(dpp[f"{key}/r{ratio}/order"][0])
        kernel[first, first] = kernel.diagonal().max() + 2e-7
        chosen = greedy_select(kernel, k)
        found = float(torch.linalg.slogdet(exact[chosen][:, chosen]).logabsdet)
        # Where the kernel's rank is all but used up, a near-tie decided the other way costs 6e-4 (in float64 as well).
        assert found == pytest.approx(facts["logdet_within_rank"], rel=1e-3, abs=1e-5)


def test_divprune_never_takes_a_token_twice_where_only_duplicates_are_left():
    features = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    chosen = select(features, k=24, method="divprune").tolist()
    assert len(set(chosen)) == 24 and {index % 16 for index in chosen} == set(range(16))


def test_divprune_starts_with_the_loneliest_token():
    points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]])
    assert DivPrune().select(VisualTokens(points[None], 2))[0, 0] == 3


def test_dpp_prefers_orthogonal_tokens():
    features = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1.0, 0], [0, 0.9, 0.1], [0, 0, 1.0]])
    assert select(features, k=3, method="dpp").tolist() == [0, 2, 4]
