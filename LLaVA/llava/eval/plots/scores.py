"""Figures that are read from results alone: kept ratios, safe ratios, sensitivity to gamma, score against time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

from llava.eval.plots.drawing import Drawn, new_figure, new_grid, styles
from llava.eval.results.rows import GREY, MEAN, Row, unpruned_of
from llava.eval.results.safe import SAFE, keys_of, safe_ratios, shown
from llava.model.llava_arch import GAMMA

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_ratios(rows: Sequence[Row]) -> Drawn:
    """Methods across kept ratios: every benchmark's score, and the mean relative to unpruned.

    Without two kept ratios of one method it is a `ValueError`.
    """
    model, rows, full = _one_model(rows)
    measured = [row for row in rows if row.pruned and row.ratio is not None and row.relative is not None]
    series = {
        name: sorted((row for row in measured if row.series == name), key=attrgetter("ratio"))
        for name in dict.fromkeys(row.series for row in measured)
    }
    series = {name: several for name, several in series.items() if len({row.ratio for row in several}) > 1}
    if not series:
        raise ValueError("the figure of kept ratios needs runs of one method at two ratios or more, and unpruned")
    keys = [*full.scores, MEAN]
    style = styles(series)
    figure, axes = new_grid(len(keys), 4, 3, 2.7, beside=1)
    records = []
    for axis, key in zip(axes, keys, strict=True):
        for name, several in series.items():
            scored = [row for row in several if row.score(key) is not None]
            _plot(axis, [row.ratio for row in scored], scored, key, markersize=4, label=name, **style[name])
            records += [
                {"model": model, "method": row.family, "configuration": row.method, "ratio": row.ratio}
                | {"benchmark": key, **_numbers(row, key, "score")}
                for row in scored
            ]
        axis.axhline(full.score(key), color="black", linestyle="--", linewidth=1)
        axis.set_title("Mean, % of unpruned" if key == MEAN else key)
        axis.set_xlabel("kept ratio")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(4, len(series)), frameon=False)
    caption = (
        f"{model}: score of each benchmark and mean relative to unpruned, by kept ratio. Dashed: unpruned. Bars: 95 % "
        "bootstrap intervals, where the runs' logs were read. Methods that were run at one ratio only are left out."
    )
    return Drawn("ratios", "Methods across kept ratios", caption, records, figure)


def draw_safe(rows: Sequence[Row], share: float = SAFE) -> Drawn:
    """Each method's safe ratio in each benchmark: `llava.eval.results.safe`.

    Without two kept ratios of one method, or without intervals, it is a `ValueError`.
    """
    model, rows, _ = _one_model(rows)
    found = safe_ratios(rows, share)
    if not any(len(set(one.tried)) > 1 for one in found):
        raise ValueError("the figure of safe ratios needs runs of one method at two ratios or more, and unpruned")
    keys, highest = keys_of(found), max(max(one.tried) for one in found)
    figure = new_figure(1.6 + 0.75 * len(keys) + 0.06 * max(len(one.method) for one in found), 1 + 0.32 * len(found))
    axis = figure.subplots()
    values = [[one.ratios.get(key) or math.nan for key in keys] for one in found]
    axis.imshow(values, cmap="YlGn_r", vmin=0, vmax=1.2 * highest, aspect="auto")
    for row, one in enumerate(found):
        for column, key in enumerate(keys):
            text = "" if key not in one.ratios else "none" if one.ratios[key] is None else f"{one.ratios[key]:g}"
            axis.text(column, row, text, ha="center", va="center", color="0.55" if text == "none" else "black")
    axis.set_xticks(range(len(keys)), keys)
    axis.set_yticks(range(len(found)), [one.method for one in found])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    records = [
        {"model": model, "method": one.method, "ratios_run": " ".join(map(str, one.tried)), "share": share}
        | {"benchmark": key, "safe_ratio": shown(one.ratios[key])}
        for one in found
        for key in keys
        if key in one.ratios
    ]
    caption = (
        f"{model}: the smallest kept ratio of those run at which the 95 % interval of the score relative to unpruned "
        f"does not fall below {100 * share:g} %; none: none of those run."
    )
    return Drawn("safe", "Safe ratios", caption, records, figure)


def draw_gamma(rows: Sequence[Row]) -> Drawn:
    """Relative mean of OTPrune by its option gamma, a line per kept ratio.

    Without two values of gamma at one ratio it is a `ValueError`.
    """
    model, rows, _ = _one_model(rows)
    runs = [row for row in rows if row.family == "otprune" and row.relative is not None and row.layer == 0]
    runs.sort(key=lambda row: (row.ratio, _gamma(row)))
    lines = [(ratio, list(several)) for ratio, several in groupby(runs, attrgetter("ratio"))]
    if not any(len(set(map(_gamma, several))) > 1 for _, several in lines):
        raise ValueError("the figure of gamma needs runs of otprune with two values of gamma or more, and unpruned")
    figure = new_figure(6.4, 4)
    axis = figure.subplots()
    for number, (ratio, several) in enumerate(lines):
        _plot(axis, map(_gamma, several), several, MEAN, marker="osD^v"[number % 5], label=f"ratio {ratio:g}")
    by_default = (_gamma(row) for row in runs if "gamma" not in row.runs[0].content["pruning"].get("set_options", ()))
    for gamma, name, style in ((GAMMA, "published", ":"), (next(by_default, None), "default at this width", "--")):
        if gamma is not None:
            axis.axvline(gamma, color="0.5", linestyle=style, label=f"{name}, {gamma:.3g}")
    axis.set(xscale="log", xlabel="gamma", ylabel="mean, % of unpruned")
    axis.legend(frameon=False)
    records = [
        {"model": model, "ratio": row.ratio, "gamma": _gamma(row), **_numbers(row, MEAN, "relative")} for row in runs
    ]
    caption = (
        f"{model}: OTPrune's relative mean by gamma, the weight of the similarity term in K = I + gamma S S^T. "
        "Vertical lines: the published value, and OTPrune's default for tokens of this model's width."
    )
    return Drawn("gamma", "Sensitivity to gamma", caption, records, figure)


def draw_time(rows: Sequence[Row]) -> Drawn:
    """Relative mean against measured time: selection and prefill where all rows have them, else the whole answer.

    Without two rows with a time and a relative mean it is a `ValueError`.
    """
    model, rows, _ = _one_model(rows)
    rows = [row for row in rows if row.relative is not None and row.method != GREY]
    times, what = [_prefill_time(row) for row in rows], "selection and prefill"
    if None in times:
        times, what = [row.answer_milliseconds for row in rows], "a prompt to its answer, images encoded"
    known = [(time, row) for time, row in zip(times, rows, strict=True) if time is not None]
    timed = sorted(known, key=itemgetter(0))
    if len(timed) < 2:
        raise ValueError("the figure of times needs two runs with measured times, and unpruned")
    figure = new_figure(8.5, 4.8)
    axis = figure.subplots()
    for name, style in styles(row.series for row in rows).items():
        own = [(time, row) for time, row in timed if row.series == name]
        if own:
            _plot(axis, [time for time, _ in own], [row for _, row in own], MEAN, linewidth=1, label=name, **style)
    records = []
    for time, row in timed:
        if row.pruned and row.ratio is not None:
            beside = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
            axis.annotate(f"{row.ratio:g}", (time, row.relative), **beside)
        better = [other.label for spent, other in timed if spent <= time and other.relative > row.relative]
        records.append(
            {"model": model, "method": row.label, "time_of": what, "milliseconds": time}
            | _numbers(row, MEAN, "relative")
            | {"no_slower_and_better": "; ".join(better)}
        )
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    axis.set(xlabel=f"measured time, {what}, ms", ylabel="mean, % of unpruned")
    caption = (
        f"{model}: relative mean against the measured mean time of {what}. Rows in the upper left are better; the CSV "
        "names for each row those that are no slower and score higher."
    )
    return Drawn("time", "Score against measured time", caption, records, figure)


def _one_model(rows: Sequence[Row]) -> tuple[str, list[Row], Row]:
    """The model, its measured rows, and the unpruned one."""
    measured = [row for row in rows if not row.published]
    models = list(dict.fromkeys(row.model for row in measured))
    if len(models) != 1:
        raise ValueError(f"a figure shows one model, and these runs are of {', '.join(models) or 'none'}")
    full = unpruned_of(measured[0], measured)
    if full is None:
        raise ValueError(f"there is no unpruned run of {models[0]} to compare with")
    return models[0], measured, full


def _gamma(row: Row) -> float:
    return row.runs[0].content["pruning"]["options"]["gamma"]


def _numbers(row: Row, key: str, name: str) -> dict[str, float | None]:
    return dict(zip((name, "low", "high"), (row.score(key), *row.interval(key)), strict=True))


def _plot(axis: Axes, places: Iterable[float], rows: Sequence[Row], key: str, **look: Any) -> None:
    """Scores by x, with intervals where all rows have them."""
    spans = [(row.score(key), *row.interval(key)) for row in rows]
    bars = None
    if rows and all(low is not None for _, low, _ in spans):
        bars = [
            [max(0.0, value - low) for value, low, _ in spans],
            [max(0.0, high - value) for value, _, high in spans],
        ]
    axis.errorbar(list(places), [value for value, *_ in spans], bars, capsize=2, elinewidth=0.8, **look)


def _prefill_time(row: Row) -> float | None:
    prefill, selection = row.milliseconds("prefill"), row.milliseconds("selection")
    selection = 0.0 if selection is None and not row.pruned else selection
    return None if prefill is None or selection is None else prefill + selection
