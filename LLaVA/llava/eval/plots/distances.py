"""Figures of transport distances: against scores, and relative to OTPrune's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from tqdm import tqdm

from llava.eval.plots.drawing import Drawn, new_figure, spearman, styles
from llava.eval.results.columns import COLUMNS
from llava.eval.results.rows import Row

if TYPE_CHECKING:
    from llava.eval.distances import Measured

PICTURES = 16
LEAST_METHODS = 3
MEAN = "Mean"
VALUES = ("wasserstein", "gaussian", "log_det")
_KEYS = tuple(column.key for column in COLUMNS)


@dataclass(frozen=True)
class Distance:
    """One configuration on the pictures of one benchmark, or "Mean", over the benchmarks.

    Attributes
    ----------
    row : Row
    benchmark : str
    wasserstein, gaussian, log_det : float
        Means over the pictures.
    """

    row: Row
    benchmark: str
    wasserstein: float
    gaussian: float
    log_det: float


def measure(
    rows: Sequence[Row],
    pictures: int = PICTURES,
    folder: Path | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> list[Distance]:
    """Distances of every configuration that drops tokens before the decoder by what is in the picture.

    Parameters
    ----------
    rows : sequence of Row
        Of one model.
    pictures : int
        How many of each benchmark.
    folder : Path, optional
        Pictures to take for all benchmarks in place of the embedded suite's.
    device : str
    progress : bool
        Say on stderr how far it is.

    Raises
    ------
    ValueError
        If the runs are of several models, or not of the mini suite and no folder is given.
    """
    from llava.eval.distances import Encoder, picture_configs, pictures_of_folder, pictures_of_suite

    configs = [(row, config) for row in rows for config in picture_configs(row)]
    if not configs:
        raise ValueError("none of the runs drops tokens before the decoder by what is in the picture alone")
    models = {run.content["model"] for row, _ in configs for run in row.runs}
    if len(models) != 1:
        raise ValueError(f"distances are measured with one model, and these runs are of {', '.join(sorted(models))}")
    if folder is None and not all(run.mini for row, _ in configs for run in row.runs):
        raise ValueError("the pictures of the published benchmarks are not at hand: give a folder (--pictures)")
    shown = pictures_of_suite(pictures) if folder is None else {MEAN: pictures_of_folder(folder, pictures)}
    encoder = Encoder.load(models.pop(), device)
    found: list[Distance] = []
    # A bar where a person watches, and nothing elsewhere.
    for benchmark, images in tqdm(shown.items(), "distances", leave=False, disable=None if progress else True):
        measured = [[encoder.measure(image, config) for _, config in configs] for image in images]
        by_row: dict[int, list[Measured]] = {}
        for one in measured:
            for (row, _), value in zip(configs, one, strict=True):
                by_row.setdefault(id(row), []).append(value)
        for row in rows:
            if values := by_row.get(id(row)):
                found.append(Distance(row, benchmark, *(mean(getattr(one, name) for one in values) for name in VALUES)))
    return found if folder is not None else found + _means(found)


def _means(found: Sequence[Distance]) -> list[Distance]:
    by_row: dict[int, list[Distance]] = {}
    for one in found:
        by_row.setdefault(id(one.row), []).append(one)
    return [
        Distance(
            several[0].row,
            MEAN,
            *(mean(getattr(one, name) for one in several) for name in VALUES),
        )
        for several in by_row.values()
    ]


def draw_distance(found: Sequence[Distance]) -> Drawn:
    """Score against exact distance, with Spearman's correlation at each kept ratio.

    The correlation is between the rank by distance, nearest first, and the rank by score, highest first: 1 where the
    nearest set always answers best.

    Raises
    ------
    ValueError
        With fewer than three methods at every ratio.
    """
    groups = _by_ratio([one for one in found if one.benchmark == MEAN and one.row.relative is not None])
    groups = {ratio: group for ratio, group in groups.items() if len({one.row.label for one in group}) >= LEAST_METHODS}
    if not groups:
        names = sorted({one.row.label for one in found})
        raise ValueError(
            f"the figure of distances needs {LEAST_METHODS} methods at one kept ratio, and unpruned; there is "
            f"{', '.join(names) or 'none'}"
        )
    wide = min(2, len(groups))
    high = -(-len(groups) // wide)
    figure = new_figure(4.4 * wide + 2.4, 3.6 * high + 0.4)
    axes = figure.subplots(high, wide, squeeze=False).ravel()
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    style = styles(one.row.method for group in groups.values() for one in group)
    lines, said, handles = [], [], {}
    for axis, (ratio, group) in zip(axes, groups.items(), strict=False):
        for one in group:
            name = one.row.method
            [handles[name]] = axis.plot(one.wasserstein, one.row.relative, linestyle="", label=name, **style[name])
        inside = [one for one in found if one.row.ratio == ratio]
        for benchmark in dict.fromkeys(one.benchmark for one in inside):
            lines += _correlated(benchmark, [one for one in inside if one.benchmark == benchmark])
        rho = spearman([one.wasserstein for one in group], [-one.row.relative for one in group])
        said.append(f"{rho:.2f} at ratio {ratio:g} ({len(group)} configurations)")
        axis.set_title(f"kept ratio {ratio:g}: Spearman {rho:.2f}")
        axis.set_xlabel("exact 2-Wasserstein distance to all tokens")
        axis.set_ylabel("mean, % of unpruned")
        axis.margins(0.1)
    figure.legend(handles=[handles[name] for name in style], loc="outside right upper", frameon=False)
    caption = (
        "Mean score against the exact 2-Wasserstein distance between all and the kept tokens, mean over pictures of "
        f"the benchmarks. Spearman's correlation of nearness and score: {', '.join(said)}."
    )
    header = ("ratio", "benchmark", "method", "wasserstein", "gaussian", "log_det", "score", "spearman_of_benchmark")
    return Drawn("distance", "Transport distance against score", caption, header, lines, figure)


def draw_relative_distance(found: Sequence[Distance]) -> Drawn:
    """Every method's distance divided by OTPrune's, a benchmark each and their mean, at the smallest common ratio.

    Raises
    ------
    ValueError
        Without OTPrune and another method at one ratio.
    """
    groups = [(ratio, _split(group)) for ratio, group in _by_ratio(found).items()]
    groups = [(ratio, split) for ratio, split in groups if all(split)]
    if not groups:
        raise ValueError("the figure of relative distances needs otprune and another method at one kept ratio")
    ratio, (reference, others) = groups[0]
    benchmarks = [key for key in (*_KEYS, MEAN) if key in reference]
    figure = new_figure(max(5.0, 0.85 * len(benchmarks) + 2), 4.4)
    axis = figure.subplots()
    style = styles(one.row.method for one in others)
    lines = []
    for method in dict.fromkeys(one.row.method for one in others):
        own = {one.benchmark: one for one in others if one.row.method == method}
        shares = [own[key].wasserstein / reference[key] for key in benchmarks]
        axis.plot(range(len(benchmarks)), shares, linestyle="", label=method, **style[method])
        lines += [
            (ratio, key, method, own[key].wasserstein, share) for key, share in zip(benchmarks, shares, strict=True)
        ]
    axis.axhline(1, color="#D55E00", linestyle="--", linewidth=1, label="otprune")
    axis.set_xticks(range(len(benchmarks)), benchmarks, rotation=35, ha="right")
    axis.set_ylabel("distance / OTPrune's")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    caption = (
        f"Exact 2-Wasserstein distance to all tokens relative to OTPrune's, kept ratio {ratio:g}; below 1 is nearer."
    )
    return Drawn(
        "relative_distance",
        "Distance relative to OTPrune",
        caption,
        ("ratio", "benchmark", "method", "wasserstein", "relative_to_otprune"),
        lines,
        figure,
    )


def _by_ratio(found: Sequence[Distance]) -> dict[float, list[Distance]]:
    groups: dict[float, list[Distance]] = {}
    for one in sorted(found, key=lambda one: one.row.ratio):
        groups.setdefault(one.row.ratio, []).append(one)
    return groups


def _split(group: Sequence[Distance]) -> tuple[dict[str, float], list[Distance]]:
    """OTPrune's distances by benchmark, and the other methods'."""
    reference = {one.benchmark: one.wasserstein for one in group if one.row.family == "otprune"}
    return reference, [one for one in group if one.row.family != "otprune"]


def _correlated(benchmark: str, group: Sequence[Distance]) -> list[tuple]:
    """CSV lines of a benchmark's configurations, each with the correlation over them."""
    scores = [one.row.relative if benchmark == MEAN else one.row.scores.get(benchmark) for one in group]
    rho = None
    if len(group) >= LEAST_METHODS and None not in scores:
        rho = spearman([one.wasserstein for one in group], [-score for score in scores])
    return [
        (one.row.ratio, benchmark, one.row.method, one.wasserstein, one.gaussian, one.log_det, score, rho)
        for one, score in zip(group, scores, strict=True)
    ]
