"""Scores on the questions that need more than a smaller image: those that a down-sampled one does not answer.

Many questions of many benchmarks can be answered from a thumbnail, and on these all methods look alike.

Source: VTC-Bench, ACL 2026, arXiv 2510.07143.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llava.benchmarks import BENCHMARKS as COLUMNS
from llava.eval.results.evidence import drawn_scores, graded
from llava.eval.results.rows import Row, relative_score, unpruned_of
from llava.eval.results.samples import read_log, right_answers

CONTROL = "downsample"


def with_filter(rows: Sequence[Row], seed: int, draws: int) -> tuple[list[Row], list[str]]:
    """Give each pruned row `Row.filtered`: its scores on the questions that ``downsample`` at its ratio cannot answer.

    Returns
    -------
    rows : list of Row
    remarks : list of str
        Which rows have no down-sampled one beside them.

    Raises
    ------
    ValueError
        If none of them has.
    """
    pruned = [row for row in rows if row.pruned and not row.published]
    remarks: list[str] = []
    found: dict[int, Row] = {}
    alone = []
    for model, ratio in dict.fromkeys((row.model, row.ratio) for row in pruned):
        group = [row for row in pruned if (row.model, row.ratio) == (model, ratio)]
        control = next((row for row in group if row.method == CONTROL and row.layer == 0), None)
        full = unpruned_of(group[0], rows)
        if control is None or full is None or ratio is None:
            alone += group
            continue
        only = {column.key: names for column in COLUMNS if (names := hard_questions(column.key, full, control))}
        found |= zip(map(id, group), _on(only, group, full, seed, draws, remarks), strict=True)
    if not found:
        raise ValueError(
            "the filter needs an unpruned run and one of downsample at the kept ratio of the others: add downsample to "
            "--method"
        )
    if alone:
        names = ", ".join(row.label for row in alone)
        remarks.append(f"Filter: without a run of downsample at their ratio, and left out: {names}.")
    return [replace(row, filtered=found.get(id(row))) for row in rows], list(dict.fromkeys(remarks))


def hard_questions(key: str, full: Row, control: Row) -> list[str]:
    """The names of a column's questions that one row answers right and another one does not; none for captions."""
    whole, small = _right(key, full), _right(key, control)
    return [name for name, right in whole.items() if right and not small.get(name, True)]


def _right(key: str, row: Row) -> Mapping[str, bool]:
    [column], run = [column for column in COLUMNS if column.key == key], row.runs[0]
    task = column.task_in(run.tasks)
    path = None if task is None else run.log(task)
    try:
        return {} if path is None else right_answers(column, read_log(path))
    except (KeyError, OSError, TypeError, ValueError):
        return {}  # `drawn_scores` says so


def _on(
    only: Mapping[str, Sequence[str]], group: Sequence[Row], full: Row, seed: int, draws: int, remarks: list[str]
) -> list[Row]:
    """Rows at one ratio, as they are on these questions alone."""
    several = [full, *group]
    scores = drawn_scores(several, seed, draws, remarks, only)
    counts = {key: len(names) for key, names in only.items()}
    filtered = [
        replace(
            row,
            scores={key: one.value for key, one in own.items()},
            questions=counts,
            evidence=None,
            rank=None,
            seed_spread=None,
        )
        for row, own in zip(several, scores, strict=True)
    ]
    filtered = [replace(row, relative=relative_score(row, filtered[0])) for row in filtered]
    return graded(filtered, scores)[1:]
