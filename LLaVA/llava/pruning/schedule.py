"""Budgets: how many tokens a kept ratio leaves, and schedules of drops at several decoder layers."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = tuple[tuple[int, float], ...]
"""(layer, fraction): from the input of that decoder layer on, that fraction of an image's visual tokens is there."""

PUBLISHED_LAYERS = 32
"""Layers of the decoder (LLaVA on a 7B Llama) that published schedules are written for."""

STEEPEST = 3.0
"""Exponent up to which `scaled` thins a schedule out before it drops earlier."""

_STEPS = 100


def kept_count(n: int, ratio: float) -> int:
    """Number of visual tokens that a kept ratio leaves of ``n``.

    ``max(1, int(round(ratio * n)))`` with Python's round (half to even), at most ``n``; 0 for a ratio of 0.
    """
    return min(n, max(1, round(ratio * n))) if ratio > 0 else 0


def apportion(k: int, sizes: list[int]) -> list[int]:
    """Split a budget 0 <= k <= sum(sizes) in proportion to sizes, in whole numbers that add up to ``k``.

    Largest remainders first; no share is larger than its size.
    """
    total = sum(sizes)
    shares = [k * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(k * sizes[i] % total), i))
    for i in by_remainder[: k - sum(shares)]:
        shares[i] += 1
    return shares


def fractions_per_layer(schedule: Schedule, num_layers: int) -> list[float]:
    """Fraction of the visual tokens that every decoder layer sees: 1 before the first drop."""
    fractions = [1.0] * num_layers
    for layer, fraction in schedule:
        fractions[layer:] = [fraction] * (num_layers - layer)
    return fractions


def mean_fraction(schedule: Schedule, num_layers: int) -> float:
    """Mean over the decoder's layers of the fraction of visual tokens present: what SUBSET_RATIO means."""
    return math.fsum(fractions_per_layer(schedule, num_layers)) / num_layers


def kept_per_layer(
    schedule: Schedule, n: int, num_layers: int, budget: Callable[[int, float], int] = kept_count
) -> list[int]:
    """Visual tokens that every decoder layer sees of an image that has ``n``; see `Pruner.kept_count`."""
    return [budget(n, fraction) for fraction in fractions_per_layer(schedule, num_layers)]


def kept_after_attention(
    schedule: Schedule, n: int, num_layers: int, budget: Callable[[int, float], int] = kept_count
) -> list[int]:
    """Visual tokens in every layer's output projection and feed-forward block, for drops after the attention.

    What a layer's input lacks has left in the layer before; a drop at ``num_layers`` is one in the last layer.
    """
    return [budget(n, fraction) for fraction in fractions_per_layer(schedule, num_layers + 1)[1:]]


def at_relative_depth(
    published: Schedule,
    num_layers: int,
    first_layer: int = 0,
    published_layers: int = PUBLISHED_LAYERS,
    forward: float = 1.0,
) -> Schedule:
    """A published schedule in a decoder of ``num_layers`` layers.

    Layers are rounded and strictly ascending; drops that would come after the last layer are left out.

    Parameters
    ----------
    published : tuple of (layer, fraction)
        For a decoder of ``published_layers`` layers.
    num_layers : int
    first_layer : int
        No drop comes before the input of this layer.
    published_layers : int
    forward : float
        Factor on all layers, at most 1.
    """
    schedule, lowest = [], first_layer
    for layer, fraction in published:
        layer = max(lowest, round(layer * num_layers / published_layers * forward))
        lowest = layer + 1
        if layer < num_layers:
            schedule.append((layer, fraction))
    return tuple(schedule)


def scaled(
    published: Schedule,
    ratio: float,
    num_layers: int,
    first_layer: int = 0,
    published_layers: int = PUBLISHED_LAYERS,
) -> Schedule:
    """The published schedule, scaled to a budget in a decoder of ``num_layers`` layers.

    Layers stay at their relative depth and every fraction f becomes f ** a, with the a for which the mean over the
    layers is ``ratio``: a = 1 is the published schedule. Where a would have to be above `STEEPEST`, all layers move
    towards the front by the largest common factor s (in steps of 1/100) that leaves a at or below it; with the layers
    at the very front any a is taken. So a smaller ratio never drops later, and among ratios that drop at the same
    layers it has the smaller fraction everywhere.

    Parameters
    ----------
    published : tuple of (layer, fraction)
        For a decoder of ``published_layers`` layers; ascending layers, 0 < fraction < 1.
    ratio : float
        Mean over the layers of the fraction of visual tokens present, 0 < ratio <= 1.
    num_layers : int
    first_layer : int
        No drop comes before the input of this layer; a ValueError if the layers before it alone exceed the budget.
    published_layers : int
    """
    if ratio * num_layers <= first_layer:
        raise ValueError(
            f"SUBSET_RATIO={ratio:g} is out of reach in a decoder of {num_layers} layers: the method drops at the "
            f"input of layer {first_layer} at the earliest, so the mean over the layers stays above "
            f"{first_layer}/{num_layers} = {first_layer / num_layers:.4g}"
        )
    for step in range(_STEPS, -1, -1):
        schedule = at_relative_depth(published, num_layers, first_layer, published_layers, step / _STEPS)
        if mean_fraction(_to_the_power(schedule, STEEPEST), num_layers) <= ratio:
            break
    return _to_the_power(schedule, _exponent(schedule, ratio, num_layers))


def _exponent(schedule: Schedule, ratio: float, num_layers: int) -> float:
    """The a for which the mean of fraction ** a over the layers is ``ratio``."""

    def mean(exponent: float) -> float:
        return mean_fraction(_to_the_power(schedule, exponent), num_layers)

    lower, upper = 0.0, 1.0
    while mean(upper) > ratio:
        lower, upper = upper, 2 * upper
    if mean(upper) == ratio:
        return upper
    for _ in range(64):
        middle = (lower + upper) / 2
        if mean(middle) > ratio:
            lower = middle
        else:
            upper = middle
    return upper


def _to_the_power(schedule: Schedule, exponent: float) -> Schedule:
    return tuple((layer, fraction**exponent) for layer, fraction in schedule)
