"""Distances between full and kept tokens, and what the greedy guarantees, against cases with known answers."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from llava.eval.transport import (
    gaussian_distance,
    guarantee,
    log_det,
    squared_distances,
    wasserstein,
)
from llava.model.llava_arch import greedy_select, ot_kernel


def tokens(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestWasserstein:
    @pytest.fixture(autouse=True)
    def _with_pot(self):
        pytest.importorskip("ot")

    def test_of_a_set_and_itself_in_another_order_is_zero(self):
        points = tokens(30, 5)
        assert wasserstein(points, points.flip(0)) == pytest.approx(0.0, abs=1e-6)

    def test_splits_the_mass_of_a_kept_token(self):
        """0, 1, 2, 3 onto 0 and 3: each kept token takes two neighbours, the inner ones travel 1."""
        full = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        assert wasserstein(full, full[[0, 3]]) == pytest.approx(math.sqrt(2 / 4))

    def test_of_one_kept_token_is_the_root_mean_square_distance_to_it(self):
        full = tokens(12, 4)
        expected = (full - full[3]).square().sum(1).mean().sqrt()
        assert wasserstein(full, full[[3]]) == pytest.approx(float(expected))

    def test_in_one_dimension_is_that_of_the_sorted_points(self):
        one, other = tokens(50, 1, 1), 2 * tokens(50, 1, 2)
        expected = (one.sort(0).values - other.sort(0).values).square().mean().sqrt()
        assert wasserstein(one, other) == pytest.approx(float(expected))

    def test_costs_are_squared_distances(self):
        full = tokens(100, 6) + 1e3
        expected = torch.cdist(full, full[:7], compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
        assert squared_distances(full, full[:7]) == pytest.approx(expected, abs=1e-9)


class TestGaussianDistance:
    def test_of_a_scaling_is_the_difference_of_the_deviations(self):
        """N(0, S) and N(0, 9 S): the roots differ by 2 S^1/2, whose squared norm is 4 tr S."""
        points = tokens(40, 5)
        points -= points.mean(0)
        trace = points.square().sum() / 40
        assert gaussian_distance(points, 3 * points) == pytest.approx(float(2 * trace.sqrt()))

    def test_is_the_formula_with_matrix_roots(self):
        one, other = tokens(30, 4, 1), tokens(8, 4, 2) * torch.tensor([1.0, 2.0, 0.5, 3.0])
        covariances = [points.T.cov(correction=0) for points in (one, other)]
        root = _root(covariances[0])
        cross = _root(root @ covariances[1] @ root)
        squared = (one.mean(0) - other.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * cross.trace()
        assert gaussian_distance(one, other) == pytest.approx(float(squared.sqrt()))

    def test_is_at_most_the_exact_distance(self):
        pytest.importorskip("ot")
        full = tokens(60, 6).exp()
        for k in (1, 5, 30):
            assert gaussian_distance(full, full[:k]) <= wasserstein(full, full[:k]) + 1e-9


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


class TestObjective:
    def test_of_a_diagonal_kernel_is_the_sum_of_logarithms(self):
        assert log_det(torch.diag(torch.tensor([1.0, 2.0, 4.0])), [1, 2]) == pytest.approx(math.log(8))


class TestGuarantee:
    def test_bounds_every_subset_and_holds_what_submodularity_promises(self):
        kernel = ot_kernel(tokens(12, 6), gamma=1.0)
        sure = guarantee(kernel, 4)
        best = max(log_det(kernel, subset) for subset in combinations(range(12), 4))
        assert sure.value == pytest.approx(log_det(kernel, greedy_select(kernel, 4)), rel=1e-5)
        assert sure.value <= best + 1e-6 <= sure.bound + 2e-6
        assert sure.share >= 1 - 1 / math.e

    def test_is_certain_where_tokens_have_nothing_in_common(self):
        sure = guarantee(torch.diag(torch.tensor([5.0, 2.0, 4.0, 3.0])), 2)
        assert sure.value == pytest.approx(math.log(20))
        assert sure.share == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("full", "kept", "said"),
    [
        (torch.zeros(0, 3), torch.zeros(1, 3), "a set without tokens"),
        (torch.zeros(4, 3), torch.zeros(2, 2), r"\(4, 3\) and \(2, 2\)"),
        (torch.full((4, 3), math.nan), torch.zeros(2, 3), "the full set has values that are not finite"),
    ],
    ids=["empty", "other width", "nan"],
)
@pytest.mark.parametrize("distance", [wasserstein, gaussian_distance])
def test_what_has_no_distance_is_refused(distance, full, kept, said):
    with pytest.raises(ValueError, match=said):
        distance(full, kept)
