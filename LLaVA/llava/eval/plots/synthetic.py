"""The synthetic experiment: is a method's subset better than random subsets of the same size? No model is needed.

Definitions. A trial draws m tokens of width d, independent and standard normal, and compares the k that a method keeps
with R random subsets of size k, by two measures: the exact 2-Wasserstein distance W between all tokens and the subset
(the smaller the better), and OTPrune's objective log det K_C (the larger the better).

* win rate: the share of the random subsets that are worse than the method's, mean over the trials, in percent;
* optimality: the best value seen in the trial (the random subsets' and the method's) against the method's, as the
  smaller one's share of the larger one, mean over the trials, in percent.

The paper (arXiv 2602.20205, table 2) does not state its data, measure and definitions: the published numbers are shown
beside these, and are not expected to be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
from tqdm import trange

from llava.eval.plots.drawing import Drawn, new_grid, styles
from llava.eval.transport import log_det, objective_kernel, squared_distances, transport_cost
from llava.pruning import PruningConfig, select

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
METHODS = ("otprune", "otprune:gamma=0.01", "divprune")
MEASURES = {"wasserstein": "exact 2-Wasserstein distance", "log_det": "log det objective"}
TRIALS, SUBSETS = 20, 100


@dataclass(frozen=True)
class Outcome:
    """One method in one setting (m, d, k), by one measure, a key of `MEASURES`; percent."""

    method: str
    measure: str
    setting: tuple[int, int, int]
    win_rate: float
    optimality: float


def run(
    settings: Sequence[tuple[int, int, int]] = SETTINGS,
    methods: Sequence[str] = METHODS,
    trials: int = TRIALS,
    subsets: int = SUBSETS,
    seed: int = 0,
    progress: bool = False,
) -> list[Outcome]:
    """The experiment in settings (m, d, k), 0 < k < m, with R = ``subsets`` random subsets per trial.

    ``methods`` may have options (`PruningConfig.from_text`) and must need nothing but features.
    """
    configs = {method: PruningConfig.from_text(method, 1.0, {}) for method in methods}
    outcomes = []
    for m, d, k in settings:
        if not 0 < k < m:
            raise ValueError(f"k must be at least 1 and below m = {m}, not {k}")
        shares = {(method, measure): [] for method in methods for measure in MEASURES}
        for trial in trange(trials, desc=f"({m}, {d}, {k})", disable=not progress):
            [state] = np.random.SeedSequence([seed, m, d, k, trial]).generate_state(1)
            generator = torch.Generator().manual_seed(int(state))
            tokens = torch.randn(m, d, generator=generator)
            values = _Values(tokens)
            drawn = [values.of(torch.randperm(m, generator=generator)[:k]) for _ in range(subsets)]
            for method, config in configs.items():
                own = values.of(select(tokens, k=k, method=config.method, **config.options))
                for measure, value in own.items():
                    shares[method, measure].append(_compared(value, [other[measure] for other in drawn]))
        outcomes += [
            Outcome(method, measure, (m, d, k), *(100 * mean(column) for column in zip(*found, strict=True)))
            for (method, measure), found in shares.items()
        ]
    return outcomes


class _Values:
    """The measures of subsets of one trial's tokens, the larger the better: a distance counts as its negative."""

    def __init__(self, tokens: torch.Tensor):
        self.cost, self.kernel = squared_distances(tokens, tokens), objective_kernel(tokens)

    def of(self, kept: torch.Tensor) -> dict[str, float]:
        distance = transport_cost(self.cost[:, kept.numpy()]) ** 0.5
        return {"wasserstein": -distance, "log_det": log_det(self.kernel, kept)}


def _compared(own: float, others: Sequence[float]) -> tuple[float, float]:
    """Win rate and optimality of a value among others, as shares."""
    sizes = sorted((abs(own), abs(max(own, *others))))
    return mean(own > other for other in others), sizes[0] / sizes[1]


def draw(outcomes: Sequence[Outcome], trials: int = TRIALS, subsets: int = SUBSETS) -> Drawn:
    """Win rate and optimality by setting, a row per measure; dotted and hollow: as published."""
    settings = list(dict.fromkeys(one.setting for one in outcomes))
    measures = list(dict.fromkeys(one.measure for one in outcomes))
    figure, axes = new_grid(2 * len(measures), 2, 4.5, 3.1)
    panels = [(measure, name, place) for measure in measures for place, name in enumerate(("win_rate", "optimality"))]
    for axis, (measure, name, place) in zip(axes, panels, strict=True):
        for method, style in styles(one.method for one in outcomes).items():
            own = {
                one.setting: getattr(one, name) for one in outcomes if (one.method, one.measure) == (method, measure)
            }
            axis.plot(range(len(settings)), [own[setting] for setting in settings], label=method, **style)
            if (method, settings[0]) in PUBLISHED:
                published = [PUBLISHED.get((method, setting), (np.nan, np.nan))[place] for setting in settings]
                hollow = {"linestyle": ":", "mfc": "none", "label": f"{method}, published", **style}
                axis.plot(range(len(settings)), published, **hollow)
        axis.set_xticks(range(len(settings)), [f"({m}, {d}, {k})" for m, d, k in settings], fontsize=8)
        axis.set_ylabel(f"{name.replace('_', ' ')}, %")
        axis.set_title(f"by {MEASURES[measure]}", fontsize=10)
    for axis in axes[-2:]:
        axis.set_xlabel("(tokens m, width d, kept k)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    records = []
    for one in outcomes:
        win_rate, optimality = PUBLISHED.get((one.method, one.setting), (None, None))
        records.append(
            {"method": one.method, "measure": one.measure, **dict(zip("mdk", one.setting, strict=True))}
            | {"win_rate": one.win_rate, "optimality": one.optimality}
            | {"published_win_rate": win_rate, "published_optimality": optimality}
        )
    caption = (
        f"Standard normal tokens, {trials} trials per setting, {subsets} random subsets per trial. Win rate: random "
        "subsets that are worse than the method's. Optimality: the best value seen against the method's. Hollow: "
        "published, of data, measure and definitions that are not stated."
    )
    return Drawn("synthetic", "Synthetic experiment", caption, records, figure)
