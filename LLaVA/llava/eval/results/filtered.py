"""Scores on the questions that need more than a smaller image: those that a down-sampled one does not answer.

Many questions of many benchmarks can be answered from a thumbnail, and on these all methods look alike.

Source: VTC-Bench, ACL 2026, arXiv 2510.07143.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llava.benchmarks import BENCHMARKS, Benchmark
from llava.eval.results.evidence import drawn_scores, graded
from llava.eval.results.rows import Row, relative_score, unpruned_of
from llava.eval.results.samples import read_log, right_answers

CONTROL = "downsample"


def with_filter(rows: Sequence[Row], seed: int, draws: int) -> tuple[list[Row], list[str]]:
    """Give each pruned row `Row.filtered`: its scores on the questions that ``downsample`` at its ratio cannot answer.

    Also returns which rows have no ``downsample`` at their ratio; if none has, it is a `ValueError`.
    """
    pruned = [row for row in rows if row.pruned and not row.published]
    remarks: list[str] = []
    found: dict[Row, Row] = {}
    alone = []
    for model, ratio in dict.fromkeys((row.model, row.ratio) for row in pruned):
        group = [row for row in pruned if (row.model, row.ratio) == (model, ratio)]
        control = next((row for row in group if row.method == CONTROL and row.layer == 0), None)
        full = unpruned_of(group[0], rows)
        if control is None or full is None or ratio is None:
            alone += group
            continue
        only = {column.key: names for column in BENCHMARKS if (names := _hard_questions(column, full, control))}
        found |= zip(group, _on(only, group, full, seed, draws, remarks), strict=True)
    if not found:
        raise ValueError(
            "the filter needs an unpruned run and one of downsample at the kept ratio of the others: add downsample to "
            "--method"
        )
    if alone:
        names = ", ".join(row.label for row in alone)
        remarks.append(f"Filter: without a run of downsample at their ratio, and left out: {names}.")
    return [replace(row, filtered=found.get(row)) for row in rows], list(dict.fromkeys(remarks))


def _hard_questions(column: Benchmark, full: Row, control: Row) -> list[str]:
    """The names of the questions that one row answers correctly and another does not; none of captions."""
    whole, small = _right(column, full), _right(column, control)
    return [name for name, right in whole.items() if right and not small.get(name, True)]


def _right(column: Benchmark, row: Row) -> Mapping[str, bool]:
    path = row.runs[0].log(column)
    try:
        return {} if path is None else right_answers(column, read_log(path))
    except (KeyError, OSError, TypeError, ValueError):
        return {}  # `drawn_scores` says so


def _on(
    only: Mapping[str, Sequence[str]], group: Sequence[Row], full: Row, seed: int, draws: int, remarks: list[str]
) -> list[Row]:
    """Rows at one ratio, as they are on these questions alone."""
    counts = {key: len(names) for key, names in only.items()}
    fresh = {"questions": counts, "evidence": None, "rank": None, "seed_spread": None}
    scores = {
        replace(row, scores={key: one.value for key, one in own.items()}, **fresh): own
        for row, own in drawn_scores([full, *group], seed, draws, remarks, only).items()
    }
    first = next(iter(scores))
    return graded({replace(row, relative=relative_score(row, first)): own for row, own in scores.items()})[1:]
