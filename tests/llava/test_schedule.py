"""What a budget means for methods that drop at several decoder layers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from llava.pruning.methods import pyramiddrop, sparsevlm
from llava.pruning.schedule import at_relative_depth, kept_per_layer, mean_fraction, scaled

RATIOS = [0.01, 0.03, 0.05, 0.098, 0.127, *(i / 20 for i in range(3, 20)), 0.99]
SCHEDULES = [
    pytest.param(pyramiddrop.PUBLISHED, 0, id="pyramiddrop"),
    pytest.param(sparsevlm.published_schedule("192", True), 1, id="sparsevlm"),
    pytest.param(((2, 0.5),), 0, id="one-drop"),
]


def exponent(stages, published):
    """The a of fraction = published fraction ** a."""
    return math.log(stages[0][1]) / math.log(published[0][1])


def at_power(stages, power):
    return tuple((layer, fraction**power) for layer, fraction in stages)


def layers_of(stages):
    return [layer for layer, _ in stages]


def feasible(num_layers, first_layer):
    return [ratio for ratio in RATIOS if ratio * num_layers > first_layer]


def test_a_layer_sees_what_the_last_drop_left():
    stages = ((1, 0.5), (3, 0.25))
    assert kept_per_layer(stages, 10, 5) == [10, 5, 5, 2, 2]
    assert mean_fraction(stages, 5) == (1 + 0.5 + 0.5 + 0.25 + 0.25) / 5


def test_a_drop_before_the_decoder_and_a_withdrawal_are_schedules_too():
    assert kept_per_layer(((0, 0.098),), 576, 3) == [56, 56, 56]
    assert kept_per_layer(((2, 0.0),), 576, 4) == [576, 576, 0, 0]
    assert mean_fraction(((2, 0.0),), 4) == 0.5


def test_the_published_layers_lie_at_the_same_relative_depth_in_another_decoder():
    assert layers_of(at_relative_depth(pyramiddrop.PUBLISHED, 32)) == [8, 16, 24]
    assert layers_of(at_relative_depth(pyramiddrop.PUBLISHED, 40)) == [10, 20, 30]
    assert layers_of(at_relative_depth(sparsevlm.published_schedule("64", True), 40, first_layer=1)) == [4, 9, 20]
    assert layers_of(at_relative_depth(((6, 0.5), (12, 0.25)), 32, published_layers=24)) == [8, 16]


def test_drops_that_a_shallow_decoder_has_no_layer_for_are_left_out():
    assert layers_of(at_relative_depth(pyramiddrop.PUBLISHED, 2)) == [0, 1]
    assert mean_fraction(scaled(pyramiddrop.PUBLISHED, 0.1, 2), 2) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize(("published", "first_layer"), SCHEDULES)
def test_the_published_schedule_comes_back_exactly_at_its_own_mean(published, first_layer):
    assert scaled(published, mean_fraction(published, 32), 32, first_layer) == published


@pytest.mark.parametrize("num_layers", range(4, 41))
@pytest.mark.parametrize(("published", "first_layer"), SCHEDULES)
def test_the_mean_over_the_layers_is_the_ratio(published, first_layer, num_layers):
    for ratio in feasible(num_layers, first_layer):
        stages = scaled(published, ratio, num_layers, first_layer)
        layers, fractions = zip(*stages, strict=True)
        # sixty-four halvings leave rounding errors of the powers and of the mean
        assert mean_fraction(stages, num_layers) == pytest.approx(ratio, rel=1e-12)
        assert first_layer <= layers[0] and layers[-1] < num_layers
        assert all(a < b for a, b in pairwise(layers))
        assert all(1 > a > b > 0 for a, b in pairwise(fractions))
        for (_, fraction), (_, original) in zip(stages, published, strict=True):
            assert fraction == pytest.approx(original ** exponent(stages, published), rel=1e-9)


@pytest.mark.parametrize("num_layers", range(4, 41))
@pytest.mark.parametrize(("published", "first_layer"), SCHEDULES)
def test_a_smaller_ratio_never_drops_later_and_thins_out_more_at_the_same_layers(published, first_layer, num_layers):
    found = [scaled(published, ratio, num_layers, first_layer) for ratio in feasible(num_layers, first_layer)]
    for smaller, larger in pairwise(found):
        assert all(a <= b for a, b in zip(layers_of(smaller), layers_of(larger), strict=True))
        if layers_of(smaller) == layers_of(larger):
            assert all(a < b for (_, a), (_, b) in zip(smaller, larger, strict=True))


@pytest.mark.parametrize("num_layers", range(4, 41))
@pytest.mark.parametrize(("published", "first_layer"), SCHEDULES)
def test_layers_move_only_as_far_as_an_exponent_of_three_makes_them(published, first_layer, num_layers):
    in_place = at_relative_depth(published, num_layers, first_layer)
    front = at_relative_depth(published, num_layers, first_layer, forward=0)
    for ratio in feasible(num_layers, first_layer):
        stages = scaled(published, ratio, num_layers, first_layer)
        if mean_fraction(at_power(in_place, 3), num_layers) <= ratio:
            assert layers_of(stages) == layers_of(in_place)
            continue
        if layers_of(stages) != layers_of(front):
            assert exponent(stages, published) <= 3 + 1e-9
        for percent in range(101):
            candidate = at_relative_depth(published, num_layers, first_layer, forward=percent / 100)
            if layers_of(candidate) > layers_of(stages):
                assert mean_fraction(at_power(candidate, 3), num_layers) > ratio


@pytest.mark.parametrize(("published", "first_layer"), SCHEDULES)
def test_kept_tokens_follow_the_schedule_to_within_rounding(published, first_layer):
    n = 576
    for num_layers in (4, 32, 40):
        for ratio in feasible(num_layers, first_layer):
            kept = kept_per_layer(scaled(published, ratio, num_layers, first_layer), n, num_layers)
            assert kept == sorted(kept, reverse=True) and kept[-1] >= 1
            # half a token a layer, or one where the fraction is below one token
            assert sum(kept) / num_layers / n == pytest.approx(ratio, abs=1 / n)


@pytest.mark.parametrize(("published", "first_layer"), SCHEDULES)
def test_a_ratio_of_one_keeps_everything(published, first_layer):
    assert kept_per_layer(scaled(published, 1.0, 32, first_layer), 100, 32) == [100] * 32


def test_a_ratio_below_what_the_first_layers_cost_is_refused_with_the_smallest_that_is_not():
    published = sparsevlm.published_schedule("192", True)
    with pytest.raises(ValueError, match=r"SUBSET_RATIO=0\.098 .* 8 layers.* layer 1 .*above 1/8 = 0\.125"):
        scaled(published, 0.098, 8, first_layer=1)
    with pytest.raises(ValueError, match=r"above 1/8"):
        scaled(published, 0.125, 8, first_layer=1)
    assert mean_fraction(scaled(published, 0.126, 8, first_layer=1), 8) == pytest.approx(0.126)
