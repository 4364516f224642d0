"""The synthetic experiment: does a method's subset lie nearer to all tokens than random subsets do? No model is needed.

Definitions. A trial draws m tokens of width d, independent and standard normal, and compares the exact 2-Wasserstein
distance W between all tokens and the k that a method keeps with that of R random subsets of size k.

* win rate: the share of the random subsets that are farther than the method's, mean over the trials, in percent;
* optimality: the smallest distance seen in the trial (the random subsets' and the method's) divided by the method's,
  mean over the trials, in percent.

The paper (arXiv 2602.20205, table 2) does not say which data and which definitions its figures stand for: the published
numbers are shown beside these, and are not expected to be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch

from llava.eval.plots.drawing import Drawn, new_figure, styles
from llava.eval.transport import squared_distances, transport_cost
from llava.pruning import select

SETTINGS = ((20, 10, 5), (30, 20, 10), (100, 50, 30), (1000, 256, 100))
"""(tokens m, width d, kept k) of the paper."""
PUBLISHED = {
    ("otprune", (20, 10, 5)): (94.56, 87.81),
    ("otprune", (30, 20, 10)): (99.49, 93.98),
    ("otprune", (100, 50, 30)): (99.99, 100.0),
    ("otprune", (1000, 256, 100)): (100.0, 100.0),
    ("divprune", (20, 10, 5)): (60.14, 74.53),
    ("divprune", (30, 20, 10)): (84.62, 76.48),
    ("divprune", (100, 50, 30)): (88.77, 92.20),
    ("divprune", (1000, 256, 100)): (97.59, 97.71),
}
METHODS = ("otprune", "divprune")
TRIALS, SUBSETS = 20, 100


@dataclass(frozen=True)
class Outcome:
    """One method in one setting.

    Attributes
    ----------
    method : str
    setting : (int, int, int)
        m, d, k.
    win_rate, optimality : float
        Percent.
    """

    method: str
    setting: tuple[int, int, int]
    win_rate: float
    optimality: float


def run(
    settings: Sequence[tuple[int, int, int]] = SETTINGS,
    methods: Sequence[str] = METHODS,
    trials: int = TRIALS,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> list[Outcome]:
    """The experiment.

    Parameters
    ----------
    settings : sequence of (m, d, k)
    methods : sequence of str
        Registered methods that need nothing but features.
    trials, subsets, seed : int
        Trials a setting, random subsets a trial (R), and where the draws start.

    Raises
    ------
    ValueError
        If there are no trials, no subsets, or a k that is not below m.
    """
    if trials < 1 or subsets < 1:
        raise ValueError(f"the experiment needs trials and subsets, not {trials} and {subsets}")
    outcomes = []
    for m, d, k in settings:
        if not 0 < k < m:
            raise ValueError(f"k must be at least 1 and below m = {m}, not {k}")
        shares = {method: [] for method in methods}
        for trial in range(trials):
            [state] = np.random.SeedSequence([seed, m, d, k, trial]).generate_state(1)
            generator = torch.Generator().manual_seed(int(state))
            tokens = torch.randn(m, d, generator=generator)
            cost = squared_distances(tokens, tokens)
            drawn = [_distance(cost, torch.randperm(m, generator=generator)[:k].numpy()) for _ in range(subsets)]
            for method in methods:
                own = _distance(cost, select(tokens, k=k, method=method).numpy())
                shares[method].append((mean(other > own for other in drawn), min(own, *drawn) / own))
        outcomes += [
            Outcome(method, (m, d, k), *(100 * mean(values) for values in zip(*shares[method], strict=True)))
            for method in methods
        ]
    return outcomes


def draw(outcomes: Sequence[Outcome], trials: int = TRIALS, subsets: int = SUBSETS) -> Drawn:
    """Win rate and optimality by setting; hollow: as published."""
    settings = list(dict.fromkeys(one.setting for one in outcomes))
    style = styles([one.method for one in outcomes])
    figure = new_figure(9, 3.8)
    axes = figure.subplots(1, 2)
    for axis, (name, place) in zip(axes, (("win_rate", 0), ("optimality", 1)), strict=True):
        for method in dict.fromkeys(one.method for one in outcomes):
            own = {one.setting: getattr(one, name) for one in outcomes if one.method == method}
            axis.plot(range(len(settings)), [own[setting] for setting in settings], label=method, **style[method])
            published = [PUBLISHED.get((method, setting), (np.nan, np.nan))[place] for setting in settings]
            axis.plot(
                range(len(settings)),
                published,
                linestyle=":",
                label=f"{method}, published",
                mfc="none",
                **style[method],
            )
        axis.set_xticks(range(len(settings)), [f"({m}, {d}, {k})" for m, d, k in settings])
        axis.set_title(f"{name.replace('_', ' ')}, %")
        axis.set_xlabel("(tokens m, width d, kept k)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    lines = []
    for one in outcomes:
        published = PUBLISHED.get((one.method, one.setting), (None, None))
        lines.append((one.method, *one.setting, one.win_rate, one.optimality, *published))
    caption = (
        f"Standard normal tokens, {trials} trials a setting, {subsets} random subsets a trial. Win rate: random "
        "subsets farther from all tokens than the method's (exact 2-Wasserstein). Optimality: the smallest distance "
        "seen over the method's. Hollow: published, of data and definitions that are not stated."
    )
    header = ("method", "m", "d", "k", "win_rate", "optimality", "published_win_rate", "published_optimality")
    return Drawn("synthetic", "Synthetic experiment", caption, header, lines, figure)


def _distance(cost: np.ndarray, kept: np.ndarray) -> float:
    return transport_cost(cost[:, kept]) ** 0.5
