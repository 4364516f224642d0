"""Figures of transport distances: against scores, and relative to OTPrune's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from llava.benchmarks import PAPER
from llava.eval import distances
from llava.eval.distances import Measured
from llava.eval.encoder import Encoder, image_configs, images_of_folder, images_of_suite
from llava.eval.plots.drawing import Drawn, new_figure, new_grid, spearman, styles
from llava.eval.results.rows import MEAN, Row

IMAGES = 16
LEAST_METHODS = 3
VALUES = ("wasserstein", "gaussian", "log_det")


@dataclass(frozen=True)
class Distance:
    """One configuration on the images of one benchmark, or "Mean", over the benchmarks: means over the images."""

    row: Row
    benchmark: str
    wasserstein: float
    gaussian: float
    log_det: float


def measure(
    rows: Sequence[Row], images: int = IMAGES, folder: Path | None = None, device: str = "cpu", progress: bool = False
) -> list[Distance]:
    """Distances of every configuration that drops tokens before the decoder by the image alone.

    They are measured on the first ``images`` of each benchmark of the embedded suite, or of ``folder``. Runs of several
    models are a `ValueError`; without ``folder``, so are runs of another suite.
    """
    configs = [(row, config) for row in rows for config in image_configs(row)]
    if not configs:
        raise ValueError("none of the runs drops tokens before the decoder by what is in the image alone")
    models = {run.content["model"] for row, _ in configs for run in row.runs} or {row.model for row, _ in configs}
    if len(models) != 1:
        raise ValueError(f"distances are measured with one model, and these runs are of {', '.join(sorted(models))}")
    if folder is None and not all("mini suite" in row.notes for row, _ in configs):
        raise ValueError("the images of the published benchmarks are not at hand: give a folder (--image-folder)")
    group = next((run.group for row, _ in configs for run in row.runs), PAPER)
    shown = images_of_suite(images, group) if folder is None else {MEAN: images_of_folder(folder, images)}
    encoder = Encoder.load(models.pop(), device)
    found: list[Distance] = []

    def add(row: Row, benchmark: str, own: Sequence[Measured | Distance]) -> None:
        found.append(Distance(row, benchmark, *(mean(getattr(one, name) for one in own) for name in VALUES)))

    for benchmark, several in tqdm(shown.items(), "distances", leave=False, disable=None if progress else True):
        # Image by image, so that an encoded image serves all configurations.
        measured = [[distances.measure(encoder, image, config) for _, config in configs] for image in several]
        for row in rows:
            own = [one for values in measured for (of, _), one in zip(configs, values, strict=True) if of is row]
            if own:
                add(row, benchmark, own)
    for row in dict.fromkeys(one.row for one in found) if folder is None else ():
        add(row, MEAN, [one for one in found if one.row is row])
    return found


def draw_distance(found: Sequence[Distance]) -> Drawn:
    """Score against exact distance, with Spearman's correlation at each kept ratio.

    The correlation is between the rank by distance, nearest first, and the rank by score, highest first: 1 if the
    nearest set always answers best. With fewer than three methods at every ratio it is a `ValueError`.
    """
    groups = _by_ratio([one for one in found if one.benchmark == MEAN and one.row.relative is not None])
    groups = {ratio: group for ratio, group in groups.items() if len({one.row.label for one in group}) >= LEAST_METHODS}
    if not groups:
        names = ", ".join(sorted({one.row.label for one in found})) or "none"
        raise ValueError(
            f"the figure of distances needs {LEAST_METHODS} methods at one kept ratio, and unpruned; there is {names}"
        )
    figure, axes = new_grid(len(groups), 2, 4.4, 3.6, beside=2.4)
    style = styles(one.row.method for group in groups.values() for one in group)
    records, said, handles = [], [], {}
    for axis, (ratio, group) in zip(axes, groups.items(), strict=True):
        for one in group:
            name = one.row.method
            [handles[name]] = axis.plot(one.wasserstein, one.row.relative, linestyle="", label=name, **style[name])
        inside = [one for one in found if one.row.ratio == ratio]
        for benchmark in dict.fromkeys(one.benchmark for one in inside):
            records += _correlated(benchmark, [one for one in inside if one.benchmark == benchmark])
        rho = spearman([one.wasserstein for one in group], [-one.row.relative for one in group])
        said.append(f"{rho:.2f} at ratio {ratio:g} ({len(group)} configurations)")
        axis.set(xlabel="exact 2-Wasserstein distance to all tokens", ylabel="mean, % of unpruned")
        axis.set_title(f"kept ratio {ratio:g}: Spearman {rho:.2f}")
        axis.margins(0.1)
    figure.legend(handles=[handles[name] for name in style], loc="outside right upper", frameon=False)
    caption = (
        "Mean score against the exact 2-Wasserstein distance between all and the kept tokens, mean over images of the "
        f"benchmarks. Spearman's correlation of nearness and score: {', '.join(said)}."
    )
    return Drawn("distance", "Transport distance against score", caption, records, figure)


def draw_relative_distance(found: Sequence[Distance]) -> Drawn:
    """Every method's distance divided by OTPrune's, each benchmark and their mean, at the smallest common ratio.

    Without OTPrune and another method at one ratio it is a `ValueError`.
    """
    groups = _by_ratio(found)
    families = {ratio: {one.row.family for one in group} for ratio, group in groups.items()}
    ratio = next((ratio for ratio, names in families.items() if "otprune" in names and len(names) > 1), None)
    if ratio is None:
        raise ValueError("the figure of relative distances needs otprune and another method at one kept ratio")
    # Of several OTPrunes, the others are divided by the one without options.
    own = min(one.row.method for one in groups[ratio] if one.row.family == "otprune")
    reference = {one.benchmark: one.wasserstein for one in groups[ratio] if one.row.method == own}
    others = sorted(
        (one for one in groups[ratio] if one.row.method != own), key=lambda one: one.row.family == "otprune"
    )
    figure = new_figure(max(5.0, 0.85 * len(reference) + 2), 4.4)
    axis = figure.subplots()
    records = []
    for method, style in styles(one.row.method for one in others).items():
        distances = {one.benchmark: one.wasserstein for one in others if one.row.method == method}
        shares = {key: distances[key] / reference[key] for key in reference}
        axis.plot(range(len(shares)), list(shares.values()), linestyle="", label=method, **style)
        records += [
            {"ratio": ratio, "benchmark": key, "method": method}
            | {"wasserstein": distances[key], "relative_to_otprune": share}
            for key, share in shares.items()
        ]
    axis.axhline(1, color="#D55E00", linestyle="--", linewidth=1, label=own)
    axis.set_xticks(range(len(reference)), list(reference), rotation=35, ha="right")
    axis.set_ylabel("distance / OTPrune's")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    caption = (
        f"Exact 2-Wasserstein distance to all tokens relative to OTPrune's, kept ratio {ratio:g}; below 1 is nearer."
    )
    return Drawn("relative_distance", "Distance relative to OTPrune", caption, records, figure)


def _by_ratio(found: Sequence[Distance]) -> dict[float, list[Distance]]:
    groups: dict[float, list[Distance]] = {}
    for one in sorted(found, key=lambda one: one.row.ratio):
        groups.setdefault(one.row.ratio, []).append(one)
    return groups


def _correlated(benchmark: str, group: Sequence[Distance]) -> list[dict]:
    """A benchmark's configurations, each with the correlation over them."""
    scores = [one.row.score(benchmark) for one in group]
    rho = None
    if len(group) >= LEAST_METHODS and None not in scores:
        rho = spearman([one.wasserstein for one in group], [-score for score in scores])
    return [
        {"ratio": one.row.ratio, "benchmark": benchmark, "method": one.row.method}
        | {name: getattr(one, name) for name in VALUES}
        | {"score": score, "spearman_of_benchmark": rho}
        for one, score in zip(group, scores, strict=True)
    ]
