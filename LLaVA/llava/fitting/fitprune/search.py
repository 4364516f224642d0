"""From a budget to a recipe: bisection over what each layer may lose, and rounding to whole tokens.

A walk sends every sample through the decoder while each layer drops what is deletable at one alpha. What it leaves does
not depend on the budget, which only decides at which layer dropping can stop; so a walk is made once for all budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llava.flops import Cost, DecoderShape

TOLERANCE = 0.01
"""Of alpha, as published: seven walks."""

ROUNDING = 1 + 1e-12
"""Room for the rounding of a budget, which is a product of a decimal fraction."""


TOKENS = Cost(1)
"""Tokens that enter the layers: what SUBSET_RATIO is a mean of."""


def visual_flops(shape: DecoderShape) -> Cost:
    """The published budget: multiply-accumulates of the visual tokens among themselves, text left out.

    3 n d^2 + 2 n^2 d before the output projection, n d^2 + 3 n d m after the attention; less for grouped heads.
    """
    return shape.costs[0]


@dataclass(frozen=True)
class Walk:
    """Tokens on their way, over all samples.

    ``tokens`` are the sums of the numbers of tokens that enter each layer, and that the last one leaves; ``squares``
    the sums of these numbers' squares.
    """

    samples: int
    tokens: Sequence[int]
    squares: Sequence[int]

    @classmethod
    def of(cls, kept: Sequence[int]) -> Walk:
        """One image's."""
        return cls(1, kept, [n * n for n in kept])

    @property
    def layers(self) -> int:
        return len(self.tokens) - 1

    def unpruned(self, cost: Cost) -> int:
        """What all samples cost if nothing leaves."""
        return self.layers * cost.layer(self.tokens[0], self.squares[0])

    def stopped_at(self, cost: Cost) -> list[int]:
        """What all samples cost if nothing leaves any more from a layer on: a number a layer, and the whole walk's."""
        costs, used = [], 0
        for layer in range(self.layers):
            entering = self.tokens[layer], self.squares[layer]
            costs.append(used + (self.layers - layer) * cost.layer(*entering))
            used += cost.attention(*entering) + cost.rest * self.tokens[layer + 1]
        return [*costs, used]

    def stop(self, cost: Cost, share: float) -> int | None:
        """The first layer from which on nothing has to leave for ``share`` of the unpruned cost; None if none is."""
        allowed = share * self.unpruned(cost) * ROUNDING
        return next((layer for layer, total in enumerate(self.stopped_at(cost)) if total <= allowed), None)


@dataclass(frozen=True)
class Found:
    """What a search ends with: the smallest alpha that meets the budget, its walk, and where dropping stops."""

    alpha: float
    walk: Walk
    stop: int

    @property
    def mean_deleted(self) -> list[float]:
        """Tokens that leave in each layer, averaged over the samples."""
        tokens, samples = self.walk.tokens, self.walk.samples
        return [
            (tokens[layer] - tokens[layer + 1]) / samples if layer < self.stop else 0.0
            for layer in range(self.walk.layers)
        ]

    @property
    def scheme(self) -> list[int]:
        """The same, rounded down: the published recipe."""
        return [int(mean) for mean in self.mean_deleted]


def least_share(cost: Cost, tokens: int, layers: int) -> float:
    """The share of the unpruned cost that is left if all tokens but one leave in the first layer."""
    walk = Walk.of([tokens] + [1] * layers)
    return walk.stopped_at(cost)[-1] / walk.unpruned(cost)


def search(walk_at: Callable[[float], Walk], cost: Cost, share: float) -> Found:
    """Bisect for the smallest alpha whose walk, ``walk_at(alpha)``, meets the budget.

    ``share`` of the unpruned cost may be spent; a ValueError if no walk meets that.
    """
    low, high, best = 0.0, 1.0, None
    while high - low > TOLERANCE + 1e-6:
        alpha = (low + high) / 2
        walk = walk_at(alpha)
        stop = walk.stop(cost, share)
        if stop is None:
            low = alpha
        else:
            high, best = alpha, Found(alpha, walk, stop)
    if best is not None:
        return best
    walk = walk_at(1.0)
    stop = walk.stop(cost, share)
    if stop is None:
        reached = walk.stopped_at(cost)[-1] / walk.unpruned(cost)
        raise ValueError(
            f"no recipe meets the budget, {share:.4g} of the unpruned cost: with nearly all visual tokens gone after "
            f"the first layer's attention, {reached:.4g} of it are left"
        )
    return Found(1.0, walk, stop)


def settle(found: Found, cost: Cost, share: float) -> tuple[int, ...]:
    """Whole numbers of tokens that meet the budget, and spend it: those that leave in each layer.

    They are of an image with the samples' mean number of tokens, rounded. The means are rounded down as published; then
    those with the largest remainders are rounded up until the budget is met, and from the last layers' tokens as many
    are given back as it allows.
    """
    tokens = round(found.walk.tokens[0] / found.walk.samples)
    deleted = found.scheme
    remainders = [mean - whole for mean, whole in zip(found.mean_deleted, deleted, strict=True)]
    layers = range(len(deleted))
    for layer in sorted((layer for layer in layers if remainders[layer]), key=lambda layer: -remainders[layer]):
        if _meets(deleted, tokens, cost, share):
            break
        deleted[layer] += 1
    # Images of different sizes on average are no image of the average size.
    while not _meets(deleted, tokens, cost, share) and sum(deleted) < tokens - 1:
        deleted[0] += 1
    for layer in reversed(layers):
        while deleted[layer] and _meets(_one_less(deleted, layer), tokens, cost, share):
            deleted = _one_less(deleted, layer)
    return tuple(deleted)


def kept_by(deleted: Sequence[int], tokens: int) -> list[int]:
    """Tokens that enter each layer, and that the last one leaves."""
    return list(accumulate(deleted, lambda left, gone: left - gone, initial=tokens))


def _meets(deleted: Sequence[int], tokens: int, cost: Cost, share: float) -> bool:
    walk = Walk.of(kept_by(deleted, tokens))
    return walk.stopped_at(cost)[-1] <= share * walk.unpruned(cost) * ROUNDING


def _one_less(deleted: Sequence[int], layer: int) -> list[int]:
    return [*deleted[:layer], deleted[layer] - 1, *deleted[layer + 1 :]]
