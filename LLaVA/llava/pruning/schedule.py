"""Schedules of methods that drop at several decoder layers, and what a budget means for them."""

from __future__ import annotations

import math
from collections.abc import Callable

from llava.pruning.base import kept_count

Stages = tuple[tuple[int, float], ...]
"""(layer, fraction): from the input of that decoder layer on, that fraction of an image's visual tokens is there."""

PUBLISHED_LAYERS = 32
"""Layers of the decoder (LLaVA on a 7B Llama) that published schedules are written for."""

STEEPEST = 3.0
"""Exponent up to which `scaled` thins a schedule out before it drops earlier."""

_STEPS = 100


def fractions_per_layer(stages: Stages, num_layers: int) -> list[float]:
    """Fraction of the visual tokens that every decoder layer sees: 1 in front of the first drop."""
    fractions = [1.0] * num_layers
    for layer, fraction in stages:
        fractions[layer:] = [fraction] * (num_layers - layer)
    return fractions


def mean_fraction(stages: Stages, num_layers: int) -> float:
    """Mean over the decoder's layers of the fraction of visual tokens present: what SUBSET_RATIO means."""
    return math.fsum(fractions_per_layer(stages, num_layers)) / num_layers


def kept_per_layer(
    stages: Stages, n: int, num_layers: int, budget: Callable[[int, float], int] = kept_count
) -> list[int]:
    """Visual tokens that every decoder layer sees of an image that has ``n``; see `Pruner.budget`."""
    return [budget(n, fraction) for fraction in fractions_per_layer(stages, num_layers)]


def kept_after_attention(
    stages: Stages, n: int, num_layers: int, budget: Callable[[int, float], int] = kept_count
) -> list[int]:
    """Visual tokens in every layer's output projection and feed-forward block, for drops behind the attention.

    What a layer's input lacks has left in the layer before; a stage at ``num_layers`` is a drop in the last layer.
    """
    return [budget(n, fraction) for fraction in fractions_per_layer(stages, num_layers + 1)[1:]]


def at_relative_depth(
    published: Stages,
    num_layers: int,
    first_layer: int = 0,
    published_layers: int = PUBLISHED_LAYERS,
    forward: float = 1.0,
) -> Stages:
    """A published schedule in a decoder of another depth.

    Parameters
    ----------
    published : tuple of (layer, fraction)
        For a decoder of ``published_layers`` layers.
    num_layers : int
        Layers of this decoder.
    first_layer : int
        No drop comes before the input of this layer.
    published_layers : int
    forward : float
        Factor on all layers, at most 1.

    Returns
    -------
    tuple of (layer, fraction)
        Layers are rounded and strictly ascending; drops that would come behind the last layer are left out.
    """
    stages, lowest = [], first_layer
    for layer, fraction in published:
        layer = max(lowest, round(layer * num_layers / published_layers * forward))
        lowest = layer + 1
        if layer < num_layers:
            stages.append((layer, fraction))
    return tuple(stages)


def scaled(
    published: Stages,
    ratio: float,
    num_layers: int,
    first_layer: int = 0,
    published_layers: int = PUBLISHED_LAYERS,
) -> Stages:
    """The published schedule, scaled to a budget.

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
        Layers of this decoder.
    first_layer : int
        No drop comes before the input of this layer.
    published_layers : int

    Returns
    -------
    tuple of (layer, fraction)

    Raises
    ------
    ValueError
        If the layers in front of the earliest possible drop alone exceed the budget.
    """
    if ratio * num_layers <= first_layer:
        raise ValueError(
            f"SUBSET_RATIO={ratio:g} is out of reach in a decoder of {num_layers} layers: the method drops at the "
            f"input of layer {first_layer} at the earliest, so the mean over the layers stays above "
            f"{first_layer}/{num_layers} = {first_layer / num_layers:.4g}"
        )
    for step in range(_STEPS, -1, -1):
        stages = at_relative_depth(published, num_layers, first_layer, published_layers, step / _STEPS)
        if mean_fraction(_to_the_power(stages, STEEPEST), num_layers) <= ratio:
            break
    return _to_the_power(stages, _exponent(stages, ratio, num_layers))


def _exponent(stages: Stages, ratio: float, num_layers: int) -> float:
    """The a for which the mean of fraction ** a over the layers is ``ratio``."""

    def mean(exponent: float) -> float:
        return mean_fraction(_to_the_power(stages, exponent), num_layers)

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


def _to_the_power(stages: Stages, exponent: float) -> Stages:
    return tuple((layer, fraction**exponent) for layer, fraction in stages)


def check_scheduled_budget(variable: str, schedule: str, ratio: float | None, layer: int | None) -> None:
    """Refuse what does not go with a schedule: a layer at all, or a ratio where the schedule fixes the budget.

    Parameters
    ----------
    variable : str
        The environment variable of the method's option ``schedule``.
    schedule : str
        "scaled", or the name of a published one.
    ratio, layer
        SUBSET_RATIO and LAYER_INDEX as given; None when left out.

    Raises
    ------
    ValueError
        Names the variables.
    """
    if layer is not None:
        raise ValueError(
            f"LAYER_INDEX={layer} must be left out: the method drops at several layers, which {variable} and "
            "SUBSET_RATIO determine"
        )
    if schedule == "scaled" and ratio is None:
        raise ValueError(
            f"SUBSET_RATIO is needed with {variable}=scaled: the mean over the decoder's layers of the fraction of "
            "visual tokens present, 0 < r <= 1"
        )
    if schedule != "scaled" and ratio is not None:
        raise ValueError(
            f"SUBSET_RATIO={ratio:g} must be left out with {variable}={schedule}, which is a budget of its own "
            f"({variable}=scaled takes one)"
        )
