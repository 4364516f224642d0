"""The table: one row per pruning configuration, one column per benchmark, read from the result folders of runs.

``python -m llava.eval.table RUN... [--format markdown|csv|json|latex|html] [--intervals] [--output FILE]``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.benchmarks import BENCHMARKS as COLUMNS
from llava.command import Parser, positive, ratio, whole
from llava.eval.results.evidence import DRAWS, with_evidence
from llava.eval.results.filtered import CONTROL, with_filter
from llava.eval.results.formats import BUDGET, FORMATS, named, render, render_cells
from llava.eval.results.rows import (
    Row,
    fold_seeds,
    published_rows,
    ranked,
    relative_score,
    row_of,
    unpruned_of,
    without_repeats,
)
from llava.eval.results.runs import Run, check_alike, described, differences, read_runs, unfinished
from llava.eval.results.safe import safe_cells, safe_ratios
from llava.files import atomic_write, check_writable

__all__ = ["BUDGET", "COLUMNS", "Row", "Table", "build_table", "load_runs", "main", "published_rows"]

DEFAULT_RUN = "results/mini"
"""Where ``run_OTPrune.sh mini`` leaves its results."""
ALWAYS_WITH_INTERVALS = ("csv", "json")

MINI_REMARK = (
    "Mini suite: small rendered data sets in the real schemas, not the published benchmarks. Its numbers compare with "
    "each other only."
)
UNTRAINED_REMARK = "Untrained: the model's weights are random. The scores only show that the pipeline works."
FLOPS_REMARK = (
    "FLOPs: of the prefill, two per multiply-accumulate, vision tower and projector included; choosing the tokens is "
    "not counted. In the papers' convention, which counts the decoder alone: flops_ratio_literature in the CSV and "
    "JSON tables."
)
MEAN_REMARK = "Mean: score relative to the same model unpruned, averaged over the columns that both rows have."
RANK_REMARK = (
    "Rank: among the rows of the same model that keep equally many tokens (within a tenth, mean over the decoder's "
    "layers), averaged over the columns that all of them have; 1 is the best."
)
PUBLISHED_RANK_REMARK = "Published ranks are as printed there, among all methods and columns of that table."
SEEDS_REMARK = "Mean of n seeds: the score is the mean of n runs that differ in the method's seed only."
INTERVALS_REMARK = (
    "Intervals: 95 %, percentiles of {draws} bootstrap draws of the benchmark's units (seed {seed}). They hold for "
    "questions like these, not for other seeds or other trainings of the model."
)
FILTER_REMARK = (
    "Filter: percent of right answers among the questions that the unpruned model answers right and downsample at the "
    "same kept ratio does not (VTC-Bench, arXiv 2510.07143): unpruned has 100 there and downsample 0. A score between "
    "0 and 1 is right from one half on; MME's and POPE's questions are counted one by one, captions not at all. Mean: "
    "over the columns."
)
SAFE_REMARK = (
    "Safe ratio: the smallest kept ratio of those run at which the 95 % interval of the score relative to unpruned, "
    "drawn on the same questions, does not fall below {percent} %."
)
TESTS_REMARK = (
    "\N{DAGGER} differs from unpruned, \N{DOUBLE DAGGER} from Random at the same budget (mean of its seeds): paired "
    "bootstrap test, two-sided, p < 0.05, not corrected for the number of tests."
)


@dataclass(frozen=True)
class Table:
    """Rows in reading order, and the remarks that belong under them."""

    rows: tuple[Row, ...]
    remarks: tuple[str, ...]

    def render_safe(self, name: str, share: float) -> str:
        """Each method's safe ratios (`llava.eval.results.safe`) in one of the formats, from a table with intervals."""
        remarks = [SAFE_REMARK.format(percent=f"{100 * share:g}"), *self.remarks]
        return render_cells(safe_cells(safe_ratios(self.rows, share)), remarks, name)

    def render(self, name: str, intervals: bool = False) -> str:
        """The table as "markdown", "csv", "json", "latex" or "html"; a `ValueError` for anything else.

        With ``intervals``, of a table that was built with them, formats for people also show 95 % intervals and marks
        of significance; those for programs always do.
        """
        if name not in FORMATS:
            raise ValueError(f"no table format {name!r}; there are {', '.join(FORMATS)}")
        return render(self.rows, self.remarks, name, intervals)


def load_runs(folders: Iterable[Path | str], unreadable: list[str] | None = None) -> list[Row]:
    """The rows of result folders; see `llava.eval.results.runs.read_runs`."""
    return [row_of(run) for run in read_runs(folders, unreadable)]


def build_table(
    rows: Sequence[Row],
    *,
    intervals: bool = False,
    folded: bool = False,
    allow_mixed: bool = False,
    filtered: bool = False,
    seed: int = 0,
    draws: int = DRAWS,
    remarks: Sequence[str] = (),
) -> Table:
    """Order rows by model, add published rows to real checkpoints, and means, ranks, intervals and tests.

    Parameters
    ----------
    rows : sequence of Row
    intervals : bool
        Read the per-sample logs for 95 % intervals and tests (seconds for the mini suite).
    folded : bool
        One row for all seeds of a method.
    allow_mixed : bool
        Show runs of different versions, data or settings together, with a remark, instead of a `ValueError`.
    filtered : bool
        Also scores on the questions that ``downsample`` does not answer; see `llava.eval.results.filtered`.
    seed, draws : int
        Of the bootstrap.
    remarks : sequence of str
        Further ones.
    """
    runs = [run for row in rows for run in row.runs]
    if not allow_mixed:
        check_alike(runs)
    rows = without_repeats(rows, allow_mixed)
    if folded:
        rows = fold_seeds(rows)
    rows, ordered = ranked(rows), []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        real = not any("mini suite" in row.notes for row in own)
        ordered += own + (published_rows(model) if real else [])
    ordered = [replace(row, relative=relative_score(row, unpruned_of(row, ordered))) for row in ordered]
    why_not: list[str] = []
    if intervals:
        ordered, why_not = with_evidence(ordered, seed, draws)
    if filtered:
        ordered, more = with_filter(ordered, seed, draws)
        why_not = [FILTER_REMARK, *dict.fromkeys([*why_not, *more])]
    said = [*_remarks(ordered, seed, draws), *why_not, *_mixed(runs), *remarks]
    return Table(tuple(ordered), tuple(said))


def _remarks(rows: Sequence[Row], seed: int, draws: int) -> list[str]:
    """Caveats of the rows and columns that there are."""
    notes = {note for row in rows for note in row.notes}
    failed = sorted({f"{named(row)}: {note}." for row in rows for note in row.notes if note.endswith("failed")})
    limits = sorted(f"Limited: {note}." for note in notes if note.startswith("first "))
    sources = sorted({f"Published: {row.source}." for row in rows if row.published})
    evidence = any(row.evidence for row in rows)
    known = [
        (any(row.flops_ratio("exact") is not None for row in rows), FLOPS_REMARK),
        (any(row.relative is not None for row in rows), MEAN_REMARK),
        (any(row.rank is not None and not row.published for row in rows), RANK_REMARK),
        (any(row.rank is not None and row.published for row in rows), PUBLISHED_RANK_REMARK),
        (any(row.seed_spread for row in rows), SEEDS_REMARK),
        (evidence, INTERVALS_REMARK.format(draws=draws, seed=seed)),
        (evidence, TESTS_REMARK),
    ]
    about = [MINI_REMARK] * ("mini suite" in notes) + [UNTRAINED_REMARK] * ("untrained" in notes)
    return [*about, *failed, *limits, *sources, *(sentence for holds, sentence in known if holds)]


def _mixed(runs: Sequence[Run]) -> list[str]:
    return [f"Mixed: {name} differs ({described(values)})." for name, values in differences(runs).items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("llava.eval.table", __doc__)
    add_arguments(parser)
    parser.add_argument("--format", choices=tuple(FORMATS), default="markdown")
    parser.add_argument(
        "--intervals", action="store_true", help="95 %% intervals and tests in the table (CSV and JSON: always)"
    )
    kinds = parser.add_mutually_exclusive_group()
    add_filter(kinds)
    add_safe(kinds, None)
    parser.add_output(None)
    return parser.run(_show, arguments)


def _show(found: argparse.Namespace) -> None:
    if found.output is not None:
        check_writable(found.output)
    unreadable: list[str] = []
    rows = load_runs(found.runs, unreadable)
    if not any(row.scores for row in rows):
        raise ValueError(unreadable[0] if unreadable else f"no finished task in {', '.join(map(str, found.runs))}")
    table = build_table(
        rows,
        intervals=found.intervals or found.safe is not None or found.format in ALWAYS_WITH_INTERVALS,
        **options_of(found),
        remarks=[f"Left out: {sentence}." for sentence in unreadable]
        + [f"Incomplete: {sentence}." for sentence in unfinished(found.runs) if "failed" not in sentence],
    )
    if found.safe is None:
        text = table.render(found.format, found.intervals)
    else:
        text = table.render_safe(found.format, found.safe)
    if found.output is None:
        print(text, end="")
    else:
        atomic_write(found.output, text)


def add_arguments(parser: Parser) -> None:
    """Arguments of the table, the figures and the report."""
    about = f"result folder of a run, or of one of its models; of figures also a CSV table (default: {DEFAULT_RUN})"
    parser.add_argument("runs", nargs="*", default=[DEFAULT_RUN], metavar="RUN", help=about)
    parser.add_argument("--fold-seeds", action="store_true", dest="folded", help="one row of all seeds of a method")
    mixed = "take runs of different versions, data or settings, and mark them"
    parser.add_argument("--allow-mixed", action="store_true", help=mixed)
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of the bootstrap (default: 0)")
    parser.add_argument(
        "--draws", type=positive, default=DRAWS, metavar="N", help=f"of the bootstrap (default: {DRAWS})"
    )


def options_of(found: argparse.Namespace) -> dict[str, Any]:
    """The options of `build_table` among them."""
    options = {name: getattr(found, name) for name in ("folded", "allow_mixed", "seed", "draws")}
    return options | {"filtered": getattr(found, "filter", None) is not None}


def add_filter(parser: Any) -> None:
    """``--filter``, of the table and the report."""
    about = "scores on the questions that this row does not answer, too; unpruned and it must be among the runs"
    parser.add_argument("--filter", choices=(CONTROL,), help=about)


def add_safe(parser: Any, default: float | None) -> None:
    """``--safe``, of all three."""
    about = "in place of scores: " if default is None else f"of the figure (default: {default}): "
    about += "the smallest kept ratio at which each method keeps this share of the unpruned score"
    parser.add_argument("--safe", type=ratio, default=default, metavar="SHARE", help=about)


if __name__ == "__main__":
    raise SystemExit(main())
