"""Figures that are read from results alone: kept ratios, sensitivity to gamma, score against measured time."""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.plots.drawing import Drawn, new_figure, styles
from llava.eval.results.columns import COLUMNS
from llava.eval.results.rows import Row, unpruned_of
from llava.model.llava_arch import GAMMA


def draw_ratios(rows: Sequence[Row]) -> Drawn:
    """Methods across kept ratios: every benchmark's score, and the mean relative to unpruned.

    Raises
    ------
    ValueError
        Without two kept ratios of one method.
    """
    model, rows = _one_model(rows)
    series: dict[str, list[Row]] = {}
    for row in rows:
        if row.pruned and row.ratio is not None and row.relative is not None:
            series.setdefault(_series(row), []).append(row)
    series = {
        name: sorted(several, key=lambda row: row.ratio)
        for name, several in series.items()
        if len({row.ratio for row in several}) > 1
    }
    if not series:
        raise ValueError("the figure of kept ratios needs runs of one method at two ratios or more, and unpruned")
    full = unpruned_of(rows[0], rows)
    keys = [column.key for column in COLUMNS if column.key in full.scores] + ["Mean"]
    style = styles(series)
    wide = min(4, len(keys))
    high = -(-len(keys) // wide)
    figure = new_figure(3 * wide + 1, 2.7 * high + 1)
    axes = figure.subplots(high, wide, squeeze=False).ravel()
    for axis in axes[len(keys) :]:
        axis.set_axis_off()
    lines = []
    for axis, key in zip(axes, keys, strict=False):
        for name, several in series.items():
            found = [(row, _score(row, key)) for row in several if _score(row, key) is not None]
            values = [value for _, value in found]
            errors = _errors([row for row, _ in found], key)
            axis.errorbar(
                [row.ratio for row, _ in found], values, errors, capsize=2, markersize=4, label=name, **style[name]
            )
            lines += [
                (model, row.family, row.method, row.ratio, key, value, *_interval(row, key)) for row, value in found
            ]
        axis.axhline(_score(full, key), color="black", linestyle="--", linewidth=1)
        axis.set_title("Mean, % of unpruned" if key == "Mean" else key)
        axis.set_xlabel("kept ratio")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(series)), frameon=False
    )
    caption = (
        f"{model}: score of each benchmark and mean relative to unpruned, by kept ratio. Dashed: unpruned. Bars: 95 % "
        "bootstrap intervals, where the runs' logs were read. Methods that were run at one ratio only are left out."
    )
    header = ("model", "method", "configuration", "ratio", "benchmark", "score", "low", "high")
    return Drawn("ratios", "Methods across kept ratios", caption, header, lines, figure)


def draw_gamma(rows: Sequence[Row]) -> Drawn:
    """Relative mean of OTPrune by its option gamma, a line a kept ratio.

    Raises
    ------
    ValueError
        Without two values of gamma at one ratio.
    """
    model, rows = _one_model(rows)
    series: dict[float, list[tuple[float, Row]]] = {}
    for row in rows:
        if row.family == "otprune" and row.relative is not None and row.layer == 0:
            gamma = row.runs[0].content["pruning"]["options"]["gamma"]
            series.setdefault(row.ratio, []).append((gamma, row))
    if not any(len({gamma for gamma, _ in several}) > 1 for several in series.values()):
        raise ValueError("the figure of gamma needs runs of otprune with two values of gamma or more, and unpruned")
    figure = new_figure(6.4, 4)
    axis = figure.subplots()
    lines = []
    for number, (ratio, several) in enumerate(sorted(series.items())):
        several = sorted(several, key=lambda pair: pair[0])
        bars = _errors([row for _, row in several], "Mean")
        values = [row.relative for _, row in several]
        axis.errorbar(
            [gamma for gamma, _ in several],
            values,
            bars,
            marker="osD^v"[number % 5],
            capsize=3,
            label=f"ratio {ratio:g}",
        )
        lines += [(model, ratio, gamma, row.relative, *_interval(row, "Mean")) for gamma, row in several]
    default = next((gamma for several in series.values() for gamma, row in several if _by_default(row)), None)
    for gamma, name, style in ((GAMMA, "published", ":"), (default, "default at this width", "--")):
        if gamma is not None:
            axis.axvline(gamma, color="0.5", linestyle=style, label=f"{name}, {gamma:.3g}")
    axis.set_xscale("log")
    axis.set_xlabel("gamma")
    axis.set_ylabel("mean, % of unpruned")
    axis.legend(frameon=False)
    caption = (
        f"{model}: OTPrune's relative mean by gamma, the weight of the similarity term in K = I + gamma S S^T. "
        "Vertical lines: the published value, and OTPrune's default for tokens of this model's width."
    )
    return Drawn(
        "gamma", "Sensitivity to gamma", caption, ("model", "ratio", "gamma", "relative", "low", "high"), lines, figure
    )


def _by_default(row: Row) -> bool:
    return "gamma" not in row.runs[0].content["pruning"].get("set_options", ())


def draw_time(rows: Sequence[Row]) -> Drawn:
    """Relative mean against measured time: selection and prefill where all rows have them, else the whole answer.

    Raises
    ------
    ValueError
        Without two rows with a time and a relative mean, or where some rows found images encoded by others.
    """
    model, rows = _one_model(rows)
    rows = [row for row in rows if row.relative is not None and row.method != "grey picture"]
    prefill = [_prefill_time(row) for row in rows]
    whole = [row.answer_milliseconds for row in rows]
    parts = None not in prefill
    encoded = [row.encoded_share for row in rows]
    if not parts and max(encoded, default=1) - min(encoded, default=1) > 0.01:
        raise ValueError(
            "the figure of times needs runs that encode their images alike, and these found between "
            f"{100 - 100 * max(encoded):.0f} and {100 - 100 * min(encoded):.0f} % of them encoded (--visual-cache off)"
        )
    timed = [(time, row) for time, row in zip(prefill if parts else whole, rows, strict=True) if time is not None]
    if len(timed) < 2:
        raise ValueError("the figure of times needs two runs with measured times, and unpruned")
    what = "selection and prefill" if parts else "a prompt to its answer, images encoded"
    series: dict[str, list[tuple[float, Row]]] = {}
    for time, row in sorted(timed, key=lambda pair: pair[0]):
        series.setdefault(_series(row), []).append((time, row))
    style = styles(dict.fromkeys(_series(row) for _, row in timed))
    figure = new_figure(8.5, 4.8)
    axis = figure.subplots()
    lines = []
    for name, several in series.items():
        values = [row.relative for _, row in several]
        errors = _errors([row for _, row in several], "Mean")
        axis.errorbar(
            [time for time, _ in several],
            values,
            errors,
            linewidth=1,
            elinewidth=0.6,
            capsize=2,
            label=name,
            **style[name],
        )
        for time, row in several:
            if row.pruned and row.ratio is not None:
                place = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
                axis.annotate(f"{row.ratio:g}", (time, row.relative), **place)
            better = [other.label for spent, other in timed if spent <= time and other.relative > row.relative]
            lines.append((model, row.label, what, time, row.relative, *_interval(row, "Mean"), "; ".join(better)))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    axis.set_xlabel(f"measured time, {what}, ms")
    axis.set_ylabel("mean, % of unpruned")
    caption = (
        f"{model}: relative mean against the measured mean time of {what}. Rows in the upper left are better; the CSV "
        "names for each row those that are no slower and score higher."
    )
    header = ("model", "method", "time_of", "milliseconds", "relative", "low", "high", "no_slower_and_better")
    return Drawn("time", "Score against measured time", caption, header, lines, figure)


def _one_model(rows: Sequence[Row]) -> tuple[str, list[Row]]:
    measured = [row for row in rows if not row.published]
    models = list(dict.fromkeys(row.model for row in measured))
    if len(models) != 1:
        raise ValueError(f"a figure shows one model, and these runs are of {', '.join(models) or 'none'}")
    if unpruned_of(measured[0], measured) is None:
        raise ValueError(f"there is no unpruned run of {models[0]} to compare with")
    return models[0], measured


def _series(row: Row) -> str:
    return row.method + (f", layer {row.layer}" if row.layer else "")


def _score(row: Row, key: str) -> float | None:
    return row.relative if key == "Mean" else row.scores.get(key)


def _interval(row: Row, key: str) -> tuple[float | None, float | None]:
    return (row.evidence.intervals.get(key) if row.evidence else None) or (None, None)


def _errors(rows: Sequence[Row], key: str) -> list[list[float]] | None:
    """Lengths below and above, or None unless all rows have an interval."""
    spans = [_interval(row, key) for row in rows]
    if any(low is None for low, _ in spans):
        return None
    values = [_score(row, key) for row in rows]
    low = [max(0.0, value - span[0]) for value, span in zip(values, spans, strict=True)]
    return [low, [max(0.0, span[1] - value) for value, span in zip(values, spans, strict=True)]]


def _prefill_time(row: Row) -> float | None:
    prefill, selection = row.milliseconds("prefill"), row.milliseconds("selection")
    if prefill is None or (row.pruned and selection is None):
        return None
    return prefill + (selection or 0)
