"""What every method guarantees, whatever it chooses: one matrix of methods and inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llava.pruning import Pruner, VisualTokens, available_methods, deferred_checks, select

ALL = available_methods()
# VTW chooses no tokens: it withdraws all of them.
CHOOSING = {name: info for name, info in ALL.items() if name != "vtw"}
METHODS = sorted(name for name, info in CHOOSING.items() if info.needs <= {"image_keys"})
N, D = 36, 24


def features(kind: str, dtype: torch.dtype, batch: int = 2) -> torch.Tensor:
    values = torch.randn(batch, N, D, generator=torch.Generator().manual_seed(5))
    if kind == "duplicates":
        values[:, N // 2 :] = values[:, : N // 2]
    elif kind == "zeros":
        values[:] = 0
    elif kind == "zero column":
        values[:, :, 3] = 0
    elif kind == "equal":
        values[:] = 1.5
    return values.to(dtype)


@pytest.mark.parametrize("k", [1, 4, N - 1, N, N + 5])
@pytest.mark.parametrize("kind", ["normal", "duplicates", "zeros", "zero column", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_k_distinct_tokens_in_raster_order(method, dtype, kind, k):
    x = features(kind, dtype)
    before = x.clone()
    chosen = select(x, k=k, method=method)
    kept = min(k, N)
    assert chosen.shape == (2, kept) and chosen.dtype == torch.int64 and chosen.device == x.device
    assert (chosen.diff(dim=1) > 0).all() and chosen.min() >= 0 and chosen.max() < N
    assert torch.equal(x, before)
    assert torch.equal(select(x, k=k, method=method), chosen)


@pytest.mark.parametrize("method", METHODS)
def test_each_image_of_a_batch_is_chosen_for_itself(method):
    x = features("normal", torch.float32, batch=5)
    batch = select(x, ratio=0.2, method=method)
    assert [row.tolist() for row in batch] == [select(row, ratio=0.2, method=method).tolist() for row in x]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_are_refused(method, value):
    x = features("normal", torch.float32)
    x[1, 7, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        select(x, k=4, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_one_token_is_kept_of_one(method):
    assert select(torch.ones(1, D), ratio=0.1, method=method).tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"k": 0}, "k must be a whole number >= 1, not 0"),
        ({"k": 2.0}, "k must be a whole number >= 1, not 2.0"),
        ({"k": True}, "k must be a whole number >= 1, not True"),
        ({"k": 2, "ratio": 0.5}, "either ratio or k"),
        ({"ratio": 1.5}, "0 < r <= 1, not 1.5"),
        ({"method": "nope"}, "unknown method 'nope'"),
        ({"method": None}, "unknown method None"),
        ({"gama": 1}, "no option 'gama'"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        select(torch.ones(4, 2), **arguments)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 4, 3), (0, 4), (4, 0), (0, 4, 3)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"\(B, N, D\)"):
        select(torch.ones(shape), ratio=0.5)


@pytest.mark.parametrize("features", [np.ones((4, 3), np.float32), [[1.0, 2.0]]], ids=["array", "list"])
def test_what_is_no_tensor_is_named(features):
    with pytest.raises(ValueError, match=rf"tensor \(N, D\).*not {type(features).__name__}"):
        select(features, ratio=0.5)


def test_numbers_may_be_numpys():
    x = features("normal", torch.float32)
    assert torch.equal(select(x, k=np.int64(5)), select(x, k=5))
    assert torch.equal(select(x, ratio=np.float32(0.25)), select(x, ratio=0.25))


def test_a_method_that_chooses_nothing_says_so():
    with pytest.raises(NotImplementedError, match="inside a model only"):
        select(torch.ones(4, 2), k=2, method="vtw")


@pytest.mark.parametrize("method", sorted(set(CHOOSING) - set(METHODS)))
def test_a_method_that_needs_a_model_says_so(method):
    with pytest.raises(ValueError, match=r"needs .* which only a model gives"):
        select(torch.ones(4, 2), k=2, method=method)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="floating"):
        select(torch.ones(4, 2, dtype=torch.int64), ratio=0.5)


def test_a_method_that_breaks_its_contract_is_found_out():
    class Twice(Pruner):
        def select(self, tokens):
            return torch.zeros(tokens.features.shape[0], tokens.k, dtype=torch.int64)

    class Short(Pruner):
        def select(self, tokens):
            return torch.zeros(tokens.features.shape[0], 1, dtype=torch.int64)

    tokens = VisualTokens(features("normal", torch.float32), k=3)
    with pytest.raises(RuntimeError, match="chose a token twice"):
        Twice().indices(tokens)
    with pytest.raises(RuntimeError, match="Short returned"):
        Short().indices(tokens)


def test_checks_may_come_after_many_batches():
    x = features("normal", torch.float32)
    with deferred_checks() as fine:
        for k in (3, 5):
            select(x, k=k)
    fine.verify()
    x[1, 7, 3] = torch.nan
    with deferred_checks() as failed:
        select(torch.ones(4, 2), k=2)
        select(x, k=4)
    with pytest.raises(ValueError, match="NaN or infinite"):
        failed.verify()
    with pytest.raises(ValueError, match="NaN or infinite"):
        select(x, k=4)


def test_uniform_first_and_last_are_where_they_say():
    x = torch.ones(10, 2)
    assert select(x, k=3, method="uniform").tolist() == [1, 5, 8]
    assert select(x, k=3, method="first_k").tolist() == [0, 1, 2]
    assert select(x, k=3, method="last_k").tolist() == [7, 8, 9]


def test_random_draws_every_token_about_equally_often():
    counts = torch.zeros(12)
    for seed in range(600):
        counts[select(torch.ones(12, 2), k=3, method="random", seed=seed)] += 1
    # binomial(600, 1/4): mean 150, standard deviation 10.6; five of them on either side
    assert counts.min() > 97 and counts.max() < 203


def test_random_differs_by_seed_and_by_image():
    x, y = features("normal", torch.float32)
    first = select(x, k=8, method="random").tolist()
    assert first == select(x, k=8, method="random").tolist()
    assert first != select(x, k=8, method="random", seed=1).tolist()
    assert first != select(y, k=8, method="random").tolist()
