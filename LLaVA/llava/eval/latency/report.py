"""Writes the results of a measurement: JSON, a Markdown table, and for curves CSV and PNG."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llava.eval.plots.drawing import new_figure, styles
from llava.eval.results.formats import markdown
from llava.files import atomic_write, check_writable, write_csv, write_json
from llava.runtime import device_name

NOT_MEASURED = "not measured"


class Report:
    """The folder of one measurement, and the name of its files; a finished one is replaced with ``force`` only."""

    about = "times are median / worst"
    """What the table's times are."""

    def __init__(self, folder: Path, name: str, force: bool):
        self._json, self._markdown = folder / f"{name}.json", folder / f"{name}.md"
        if self._json.exists() and not force:
            raise FileExistsError(f"{self._json} is a finished measurement: choose another --output, or use --force")
        check_writable(self._json)
        self.folder, self.name = folder, name

    def write(self, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], table: str) -> str:
        """Write both files, the JSON last, and return the Markdown."""
        machine = describe_machine(settings["device"])
        where = f"{machine['name']}, PyTorch {machine['torch']}; {self.about}"
        text = f"`{settings['command']}`\n\n{where}\n\n{table}\n"
        atomic_write(self._markdown, text)
        write_json(self._json, {"settings": dict(settings), "machine": machine, "rows": list(rows)})
        return text

    def write_curve(self, points: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Write ``<name>_curve.csv``, and a plot of it if matplotlib is installed.

        ``points`` are the rows of `select.measure` by what changes ("N", "k", "batch").
        """
        numbers = ("method", "n", "k", "batch")
        lines = [
            [axis, *(row[name] for name in numbers), row["ms"]["median"], row["ms"]["worst"], row["times_published"]]
            for axis, rows in points.items()
            for row in rows
        ]
        header = ["axis", *numbers, "ms_median", "ms_worst", "times_published"]
        write_csv(self.folder / f"{self.name}_curve.csv", header, lines)
        _draw(points, self.folder / f"{self.name}_curve.png")


def _draw(points: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    try:
        figure = new_figure(3.6 * len(points), 3.4)
    except ImportError as error:
        print(f"{file.name} was not drawn: {error}")
        return
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

    plain = StrMethodFormatter("{x:g}")
    plots = figure.subplots(1, len(points), squeeze=False)[0]
    for plot, (axis, rows) in zip(plots, points.items(), strict=True):
        for method, style in styles(row["method"] for row in rows).items():
            own = [row for row in rows if row["method"] == method]
            sizes, times = [row[axis.lower()] for row in own], [row["ms"]["median"] for row in own]
            plot.plot(sizes, times, label=method, **style)
        # Along N the share that is kept stays.
        fixed = ["batch"] if axis == "N" else [name for name in ("N", "k", "batch") if name != axis]
        title = ", ".join(f"{name} = {rows[0][name.lower()]}" for name in fixed)
        plot.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms, this machine", title=title)
        plot.xaxis.set(major_locator=FixedLocator(sorted({row[axis.lower()] for row in rows})))
        plot.xaxis.set(minor_locator=NullLocator(), major_formatter=plain)
        plot.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter=plain)
        plot.grid(alpha=0.25)
    plots[0].legend(fontsize="small")
    atomic_write(file, lambda part: figure.savefig(part, format="png", dpi=150))


def settings_of(batches: Sequence[int], has_cache: bool = True) -> list[tuple[int, bool]]:
    """Batch sizes with and without the cache, if there is one, first of all batch 1 without it."""
    caches = (False, True) if has_cache else (False,)
    return list(dict.fromkeys((batch, cached) for batch in (1, *batches) for cached in caches))


def add_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples per second over those of the method's first row ("times_plain") and of the first ("times_unpruned")."""
    for row in rows:
        own = next(other for other in rows if other["method"] == row["method"])
        row["times_plain"] = row["samples_per_second"] / own["samples_per_second"]
        row["times_unpruned"] = row["samples_per_second"] / rows[0]["samples_per_second"]
    return list(rows)


def table(columns: Mapping[str, str | Callable[[Any], str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: columns are heading -> format of a row's cell, or a function that gives its text."""
    lines = [[cell(row) if callable(cell) else cell.format_map(row) for cell in columns.values()] for row in rows]
    return markdown(list(columns), lines).rstrip("\n")


def mebibytes(size: int | None) -> str:
    """A size, or that there is none."""
    return NOT_MEASURED if size is None else f"{size / 2**20:.1f}"


def describe_machine(device: str) -> dict[str, Any]:
    """What was measured on: "name", "torch", "threads"."""
    threads = torch.get_num_threads()
    on_cpu = torch.device(device).type != "cuda"
    cores = f", {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}" if on_cpu else ""
    return {"name": device_name(device) + cores, "torch": torch.__version__, "threads": threads}
