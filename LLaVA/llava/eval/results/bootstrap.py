"""Intervals and paired tests by drawing a benchmark's units again, the same draws for every run that was asked them.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 13 (percentile interval) and 16 (test: the
distribution of differences, shifted to no difference).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from llava.eval.results.samples import Units

DRAWS = 2000
LEVEL = 0.95
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Comparison:
    """A difference between two runs on the same units.

    Attributes
    ----------
    difference, low, high : float
        As measured, and its 95 % interval.
    p : float
        Two-sided, of no difference; not corrected for the number of tests.
    """

    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Evidence:
    """Of one row; columns without a usable log are missing.

    Attributes
    ----------
    intervals : dict of (low, high)
        By column key, and "Mean" (the relative mean, in percent).
    unpruned, random : dict of Comparison
        Against the same model unpruned, and against Random at the same budget, by column key and "Mean".
    best_other : Comparison, or None
        Of the relative mean, against the best other row at the same budget.
    """

    intervals: Mapping[str, tuple[float, float]]
    unpruned: Mapping[str, Comparison]
    random: Mapping[str, Comparison]
    best_other: Comparison | None = None


def draw_scores(group: Sequence[Units], label: str, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Scores on resampled units, the same units for all of a group.

    Parameters
    ----------
    group : sequence of Units
        With the same names.
    label : str
        The benchmark's name: another one draws otherwise.
    seed, draws : int

    Returns
    -------
    ndarray (len(group), draws), float64
    """
    random = np.random.default_rng([seed, crc32(label.encode())])
    units = len(group[0].names)
    strata = group[0].strata
    members = [np.flatnonzero(strata == stratum) for stratum in range(strata.max() + 1)]
    scores = np.empty((len(group), draws))
    step = max(1, _AT_ONCE // units)
    for start in range(0, draws, step):
        number = min(step, draws - start)
        counts = np.empty((number, units))
        for inside in members:
            counts[:, inside] = random.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), size=number)
        for row, one in enumerate(group):
            scores[row, start : start + number] = one.score(counts @ one.parts)
    return scores


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The percentile interval of draws, to six decimals: what lies beyond is the order of a machine's sums."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return round(float(low), 6), round(float(high), 6)


def compare(value: float, draws: np.ndarray, other: float, other_draws: np.ndarray) -> Comparison:
    """A run against another, both drawn on the same units."""
    difference = value - other
    drawn = draws - other_draws
    # Sums of the same units in another order differ in the last digits.
    beyond = np.abs(drawn - difference) >= abs(difference) - 1e-9
    p = (1 + int(beyond.sum())) / (1 + len(drawn))
    return Comparison(round(difference, 6), *interval(drawn), round(p, 6))
