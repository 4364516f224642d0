"""OTPrune against the published code, and where the published code goes wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from golden_features import DTYPES, load_features
from llava.model.llava_arch import OTPrune, gamma_for_width, greedy_select, ot_kernel
from llava.pruning import select

RATIOS = ("0.05", "0.098", "0.15", "0.2", "0.5", "1.0")


@pytest.fixture(scope="module")
def selection(golden_pruning):
    return np.load(golden_pruning / "otprune_selection.npz")


@pytest.fixture(scope="module")
def meta(golden_pruning):
    return json.loads((golden_pruning / "selection_meta.json").read_text())["otprune"]


def pytest_generate_tests(metafunc):
    """One test a golden matrix, whatever golden data is at hand."""
    if "case" in metafunc.fixturenames:
        from golden import golden_root

        keys = json.loads((golden_root() / "pruning" / "selection_meta.json").read_text())["otprune"]
        dtypes = metafunc.function.dtypes
        metafunc.parametrize("case", [key for key in keys if key.rsplit("/", 1)[1] in dtypes])


def for_dtypes(*dtypes):
    def mark(test):
        test.dtypes = dtypes
        return test

    return mark


def log_det(kernel: torch.Tensor, indices) -> float:
    chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
    return float(torch.linalg.slogdet(kernel.double()[chosen][:, chosen]).logabsdet)


def count_common(features: torch.Tensor, a, b) -> int:
    """How many tokens two selections share, exact duplicates counted as equal."""
    rows = [tuple(row.tolist()) for row in features]
    left, right = sorted(rows[i] for i in a), sorted(rows[i] for i in b)
    common = 0
    for row in set(left):
        common += min(left.count(row), right.count(row))
    return common


@for_dtypes("float32")
def test_float32_order_is_the_published_one_up_to_the_first_near_tie(case, golden_pruning, selection, meta):
    features = load_features(golden_pruning, case.rsplit("/", 1)[0])
    expected = selection[f"{case}/order_full"]
    order = greedy_select(ot_kernel(features), len(features)).numpy()
    stable = meta[case]["stable_prefix_1e-5"]
    assert order[:stable].tolist() == expected[:stable].tolist()


@for_dtypes("float32")
def test_float32_sets_are_as_good_as_the_published_ones(case, golden_pruning, selection, meta):
    features = load_features(golden_pruning, case.rsplit("/", 1)[0])
    kernel = ot_kernel(features)
    for ratio in RATIOS:
        expected = selection[f"{case}/r{ratio}/set"]
        chosen = select(features, ratio=float(ratio), gamma=0.01)
        assert len(chosen) == len(expected) == meta[case]["ratios"][ratio]["k"]
        # 98 % and 1e-5: near-ties (a gap below float32 rounding) may fall either way without changing the objective
        assert count_common(features, chosen.tolist(), expected.tolist()) >= 0.98 * len(expected)
        assert log_det(kernel, chosen) == pytest.approx(meta[case]["ratios"][ratio]["logdet"], rel=1e-5)
        if meta[case]["ratios"][ratio]["min_margin"] > 1e-5:
            assert chosen.tolist() == expected.tolist()


@for_dtypes("float64")
def test_float64_kernels_give_the_published_order_to_the_end(case, golden_pruning, selection):
    features = load_features(golden_pruning, case.rsplit("/", 1)[0], "float64")
    x = features / torch.linalg.vector_norm(features, dim=0)
    similarity = x @ x.T
    kernel = torch.eye(len(x), dtype=torch.float64) + 0.01 * similarity @ similarity.T
    margins = selection[f"{case}/margin_full"]
    # exact duplicates have no margin; the order before the first of them is determined
    stable = int(np.argmax(margins < 1e-9)) if (margins < 1e-9).any() else len(margins)
    order = greedy_select(kernel, len(features)).numpy()
    assert order[:stable].tolist() == selection[f"{case}/order_full"][:stable].tolist()


@for_dtypes("float32", "float64", "float16", "bfloat16")
def test_compat_returns_the_published_tokens_in_the_published_order(case, golden_pruning, selection, meta):
    key, dtype = case.rsplit("/", 1)
    features = load_features(golden_pruning, key, dtype)
    for ratio in RATIOS:
        expected = selection[f"{case}/r{ratio}/returned"].tolist()
        returned = select(features, ratio=float(ratio), compat=True).tolist()
        if returned == expected:
            continue
        # Rounding of the machine's matrix product decides steps whose margin is below its precision.
        precision, shared = {
            "float64": (1e-9, 0.85),
            "float32": (1e-5, 0.98),
            "float16": (1e-3, 0.9),
            "bfloat16": (1e-2, 0.75),
        }[dtype]
        margins = selection[f"{case}/margin_full"][: len(expected)]
        assert (margins < precision).any(), f"r={ratio}: a different choice without a near-tie"
        assert count_common(features, returned, expected) >= shared * len(expected)


def test_kernel_is_the_published_one(golden_pruning):
    data = np.load(golden_pruning / "small_kernels.npz")
    for shape in ("64x16", "16x64"):
        keys = [key for key in data.files if shape in key]
        features = torch.from_numpy(data[next(key for key in keys if key.endswith("/X"))])
        for name in ("otprune_kernel_float32", "otprune_kernel_float64"):
            expected = data[next(key for key in keys if key.endswith(name))]
            # products of 16 to 64 float32 terms: a few units in the last place of entries of order 1
            np.testing.assert_allclose(ot_kernel(features).numpy(), expected, rtol=2e-5, atol=1e-6)


def test_kernel_of_a_batch_is_the_kernel_of_each_image():
    features = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    batch = ot_kernel(features)
    assert batch.shape == (3, 40, 40) and batch.dtype == torch.float32
    for row, single in zip(batch, features, strict=True):
        torch.testing.assert_close(row, ot_kernel(single))


def test_greedy_of_a_batch_is_the_greedy_of_each_image():
    kernels = ot_kernel(torch.randn(4, 50, 30, generator=torch.Generator().manual_seed(1)))
    batch = greedy_select(kernels, 20)
    assert batch.shape == (4, 20) and batch.dtype == torch.int64
    assert [row.tolist() for row in batch] == [greedy_select(kernel, 20).tolist() for kernel in kernels]


def test_greedy_gains_multiply_to_the_determinant():
    kernel = ot_kernel(10 * torch.randn(30, 12, generator=torch.Generator().manual_seed(2)), gamma=1.0)
    order = greedy_select(kernel, 10)
    for step in range(1, 10):
        rest = [j for j in range(30) if j not in order[:step].tolist()]
        best = max(log_det(kernel, [*order[:step].tolist(), j]) for j in rest)
        assert log_det(kernel, order[: step + 1]) == pytest.approx(best, rel=1e-5)


def test_ties_go_to_the_lowest_index():
    assert greedy_select(torch.eye(5), 3).tolist() == [0, 1, 2]
    assert select(torch.ones(9, 4), k=3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [0, -1, 6])
def test_greedy_refuses_a_budget_outside_the_kernel(k):
    with pytest.raises(ValueError, match=f"not {k}"):
        greedy_select(torch.eye(5), k)


def test_greedy_refuses_what_is_no_square_matrix():
    with pytest.raises(ValueError, match=r"\(4, 5\)"):
        greedy_select(torch.zeros(4, 5), 2)


def edge_cases():
    from golden import golden_root

    cases = json.loads((golden_root() / "pruning" / "edge_cases.json").read_text())["cases"]
    return [pytest.param(case, id=case["name"]) for case in cases]


@pytest.mark.parametrize("edge", edge_cases())
def test_edge_cases_give_distinct_valid_tokens_or_a_clear_error(edge, golden_pruning):
    features = torch.from_numpy(np.load(golden_pruning / "edge_cases.npz")[edge["X_key"]]).to(DTYPES[edge["dtype"]])
    if not features.isfinite().all():
        with pytest.raises(ValueError, match="NaN or infinite"):
            select(features, ratio=edge["ratio"])
        return
    chosen = select(features, ratio=edge["ratio"], gamma=0.01).tolist()
    assert len(chosen) == max(1, round(edge["ratio"] * edge["n"]))
    assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < edge["n"]


def test_edge_cases_in_compat_are_the_published_failures(golden_pruning):
    """Restarts after a NaN kernel included: the published order of a zero column is reproduced."""
    cases = json.loads((golden_pruning / "edge_cases.json").read_text())["cases"]
    data = np.load(golden_pruning / "edge_cases.npz")
    compared = 0
    for case in cases:
        key = f"{case['name']}/otprune/returned"
        features = torch.from_numpy(data[case["X_key"]]).to(DTYPES[case["dtype"]])
        if key not in data.files or not features.isfinite().all() or "error" in case["otprune"]:
            continue
        if case["dtype"] == "float32" and case["otprune"]["k"] < case["n"]:
            assert select(features, ratio=case["ratio"], compat=True).tolist() == data[key].tolist(), case["name"]
            compared += 1
    assert compared > 0


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_gamma_must_be_positive(gamma):
    with pytest.raises(ValueError, match="gamma"):
        OTPrune(gamma=gamma)


@pytest.mark.parametrize("size", [1e-25, 1e-30, 1e-42])
def test_a_column_too_small_to_be_normalised_counts_as_zero(size):
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(4))
    zero, small = features.clone(), features.clone()
    zero[:, 5] = 0
    small[:, 5] *= size
    assert select(small, k=12).tolist() == select(zero, k=12).tolist()
    torch.testing.assert_close(ot_kernel(small), ot_kernel(zero))


def test_selection_does_not_touch_its_input():
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(3))
    before = features.clone()
    select(features, k=5)
    select(features, k=5, compat=True)
    assert torch.equal(features, before)


def test_gamma_is_relative_to_the_square_of_the_width():
    """As docs/evidence.md says: the kernel of tokens three times as wide is that of a gamma nine times as large."""
    features = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ot_kernel(features.repeat(1, 3), gamma=0.01), ot_kernel(features, gamma=0.09))


@pytest.mark.parametrize(
    ("width", "gamma"), [(192, 4.5511), (896, 0.20898), (2048, 0.04), (3584, 0.013061), (4096, 0.01), (5120, 0.01)]
)
def test_the_default_gamma_weighs_like_the_published_one_at_its_width(width, gamma):
    assert gamma_for_width(width) == pytest.approx(gamma, rel=1e-4)
    assert OTPrune().for_width(width).gamma == gamma_for_width(width)
    assert OTPrune(compat=True).for_width(width).gamma == 0.01
    assert OTPrune(gamma=0.5, compat=True).for_width(width).gamma == 0.5


@pytest.mark.parametrize("compat", [False, True])
def test_selection_takes_the_gamma_of_the_tokens_own_width(compat):
    features = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(5)) ** 3
    gamma = 0.01 if compat else gamma_for_width(16)
    assert torch.equal(select(features, k=9, compat=compat), select(features, k=9, gamma=gamma, compat=compat))
    assert not torch.equal(select(features, k=9, gamma=0.01), select(features, k=9, gamma=gamma_for_width(16)))
