"""The figures, each by one command, each as PNG and CSV, the same bytes each time.

    python -m llava.eval.figures NAME RUN... [--output DIR]

NAME is one of distance, relative_distance, ratios, gamma, time, synthetic (which needs no run), or all: every figure
that the runs have the data for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.command import Parser, find_device, positive
from llava.eval.plots import distances
from llava.eval.plots.drawing import Drawn
from llava.eval.plots.scores import draw_gamma, draw_ratios, draw_time
from llava.eval.results.rows import Row
from llava.eval.results.runs import missing_tasks, unfinished
from llava.eval.table import add_arguments, build_table, load_runs
from llava.files import check_writable

FROM_SCORES = {"ratios": draw_ratios, "gamma": draw_gamma, "time": draw_time}
FROM_DISTANCES = {
    "distance": distances.draw_distance,
    "relative_distance": distances.draw_relative_distance,
}
NAMES = (*FROM_DISTANCES, *FROM_SCORES, "synthetic")


def check_complete(rows: Sequence[Row]) -> None:
    """Refuse runs that a figure would show only in part.

    Raises
    ------
    ValueError
        Names the first thing that is missing: a configuration's task, its samples, or a benchmark that another has.
    """
    runs = [run for row in rows for run in row.runs]
    for run in runs:
        if said := missing_tasks(run):
            raise ValueError(f"the run is not complete: {said[0]}")
    measured = [row for row in rows if not row.published]
    if not measured:
        raise ValueError("there is no run to show")
    for row in measured:
        if row.scores.keys() != measured[0].scores.keys():
            differ = sorted(row.scores.keys() ^ measured[0].scores.keys())
            raise ValueError(f"{row.label} and {measured[0].label} differ in what they were asked: {', '.join(differ)}")


def draw_figures(
    names: Sequence[str],
    rows: Sequence[Row],
    pictures: int,
    folder: Path | None = None,
    device: str = "cpu",
    any_of: bool = False,
) -> tuple[list[Drawn], list[str]]:
    """Draw figures of rows.

    Parameters
    ----------
    names : sequence of str
        Of `NAMES`.
    rows : sequence of Row
        Of a table, intervals included where they are to be shown.
    pictures, folder, device
        See `llava.eval.plots.distances.measure`.
    any_of : bool
        Leave out a figure that the rows have no data for, and say why.

    Returns
    -------
    figures : list of Drawn
    left_out : list of str

    Raises
    ------
    ValueError
        If a figure lacks data, unless ``any_of``.
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
                drawn.append(FROM_SCORES[name](rows))
            else:
                if measured is None:
                    measured = distances.measure(rows, pictures, folder, device, progress=True)
                drawn.append(FROM_DISTANCES[name](measured))
        except ValueError as error:
            if not any_of:
                raise
            left_out.append(str(error))
    return drawn, list(dict.fromkeys(left_out))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("llava.eval.figures", __doc__)
    parser.add_argument("name", choices=(*NAMES, "all"), metavar="NAME", help=f"{', '.join(NAMES)}, all")
    add_arguments(parser)
    parser.add_output("figures", folder=True)
    parser.add_argument("--no-intervals", action="store_true", help="do not read the per-sample logs")
    add_picture_arguments(parser)
    return parser.run(_draw, argv)


def _draw(found: argparse.Namespace) -> None:
    check_writable(found.output / f"{found.name}.png")
    rows = _rows(found)
    names = NAMES if found.name == "all" else (found.name,)
    drawn, left_out = draw_figures(
        names, rows, found.pictures, found.picture_folder, find_device(found.device), any_of=found.name == "all"
    )
    for one in drawn:
        print(one.save(found.output))
        print(f"  {one.caption}")
    for sentence in left_out:
        print(f"left out: {sentence}")


def add_picture_arguments(parser: Parser) -> None:
    """How distances are measured: for the figures and the report."""
    parser.add_argument(
        "--pictures", type=positive, default=16, metavar="N", help="pictures a benchmark for distances (default: 16)"
    )
    parser.add_argument(
        "--picture-folder", type=Path, metavar="DIR", help="pictures for distances (default: the embedded suite's)"
    )
    parser.add_device("cpu", "for distances: ")


def _rows(found: argparse.Namespace) -> Sequence[Row]:
    if found.name == "synthetic":
        return []
    rows = load_runs(found.runs)
    for sentence in unfinished(found.runs):
        raise ValueError(f"the run is not complete: {sentence}")
    table = build_table(
        rows,
        intervals=not found.no_intervals,
        folded=found.fold_seeds,
        allow_mixed=found.allow_mixed,
        seed=found.seed,
        draws=found.draws,
    )
    check_complete(table.rows)
    return table.rows


if __name__ == "__main__":
    raise SystemExit(main())
