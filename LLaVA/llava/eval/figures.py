"""Figures of finished runs, each as PNG and CSV, the same bytes each time.

    python -m llava.eval.figures NAME RUN... [--output DIR]

NAME is one of distance, relative_distance, ratios, safe, gamma, time, synthetic (which needs no run), or all: every
figure that the runs have the data for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.command import Parser, find_device, positive
from llava.eval.plots import distances
from llava.eval.plots.drawing import Drawn
from llava.eval.plots.scores import draw_gamma, draw_ratios, draw_safe, draw_time
from llava.eval.results.formats import read_table
from llava.eval.results.rows import Row
from llava.eval.results.runs import unfinished
from llava.eval.results.safe import SAFE
from llava.eval.table import Table, add_arguments, add_safe, build_table, load_runs, options_of
from llava.files import check_writable

FROM_SCORES = {"ratios": draw_ratios, "safe": draw_safe, "gamma": draw_gamma, "time": draw_time}
FROM_DISTANCES = {"distance": distances.draw_distance, "relative_distance": distances.draw_relative_distance}
NAMES = (*FROM_DISTANCES, *FROM_SCORES, "synthetic")


def complete_table(folders: Sequence[Path | str], **options: Any) -> Table:
    """`build_table` of complete runs and of CSV tables.

    A `ValueError` names the first thing that is missing: a configuration's task, its samples, or a benchmark that
    another configuration has.
    """
    tables = [path for path in map(Path, folders) if path.suffix == ".csv"]
    runs = [path for path in map(Path, folders) if path not in tables]
    rows = [row for path in tables for row in read_table(path)] + load_runs(runs)
    for sentence in unfinished(runs):
        raise ValueError(f"the run is not complete: {sentence}")
    table = build_table(rows, **options)
    first, *others = [row for row in table.rows if not row.published]
    for row in others:
        if differ := sorted(row.scores.keys() ^ first.scores.keys()):
            raise ValueError(f"{row.label} and {first.label} differ in what they were asked: {', '.join(differ)}")
    return table


def draw_figures(
    names: Sequence[str],
    rows: Sequence[Row],
    images: int,
    folder: Path | None = None,
    device: str = "cpu",
    any_of: bool = False,
    safe: float = SAFE,
) -> tuple[list[Drawn], list[str]]:
    """Draw figures of a table's rows; a figure without data is a `ValueError`.

    With ``any_of`` it is one of the sentences, and so are distances for which a model, images or POT are missing.

    ``images``, ``folder`` and ``device`` are those of `plots.distances.measure`; ``safe`` is the share of the figure of
    safe ratios.
    """
    drawn: list[Drawn] = []
    left_out: list[str] = []
    measured = None
    for name in names:
        try:
            if name == "synthetic":
                from llava.eval.plots import synthetic

                drawn.append(synthetic.draw(synthetic.run(progress=True)))
            elif name in FROM_SCORES:
                drawn.append(draw_safe(rows, safe) if name == "safe" else FROM_SCORES[name](rows))
            else:
                if measured is None:
                    measured = distances.measure(rows, images, folder, device, progress=True)
                drawn.append(FROM_DISTANCES[name](measured))
        except (ImportError, OSError, ValueError) as error:
            if not any_of or not (name in FROM_DISTANCES or isinstance(error, ValueError)):
                raise
            left_out.append(str(error))
    return drawn, list(dict.fromkeys(left_out))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("llava.eval.figures", __doc__)
    parser.add_argument("name", choices=(*NAMES, "all"), metavar="NAME", help=f"{', '.join(NAMES)}, all")
    add_arguments(parser)
    parser.add_output("figures", folder=True)
    add_safe(parser, SAFE)
    parser.add_argument("--no-intervals", action="store_true", help="do not read the per-sample logs")
    add_image_arguments(parser)
    return parser.run(_draw, argv)


def _draw(found: argparse.Namespace) -> None:
    check_writable(found.output / f"{found.name}.png")
    rows: Sequence[Row] = ()
    if found.name != "synthetic":
        rows = complete_table(found.runs, intervals=not found.no_intervals, **options_of(found)).rows
    names = NAMES if found.name == "all" else (found.name,)
    device, every = find_device(found.device), found.name == "all"
    drawn, left_out = draw_figures(names, rows, found.images, found.image_folder, device, every, found.safe)
    for one in drawn:
        print(one.save(found.output))
        print(f"  {one.caption}")
    for sentence in left_out:
        print(f"left out: {sentence}")


def add_image_arguments(parser: Parser) -> None:
    """How distances are measured: for the figures and the report."""
    number, folder = "images per benchmark for distances (default: 16)", "images for distances (default: the suite's)"
    parser.add_argument("--images", "--pictures", type=positive, default=16, metavar="N", help=number)
    parser.add_argument("--image-folder", "--picture-folder", type=Path, metavar="DIR", help=folder)
    parser.add_device("cpu", "for distances: ")


if __name__ == "__main__":
    raise SystemExit(main())
