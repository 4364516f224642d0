"""What a table's differences are worth: 95 % intervals, and tests against unpruned and Random, from the logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from llava.eval.results.bootstrap import DRAWS, Comparison, Evidence, compare, draw_scores, interval
from llava.eval.results.cider import CaptionsCannotBeScored, cider_of_runs
from llava.eval.results.columns import COLUMNS, Column
from llava.eval.results.rows import Row, same_budget, unpruned_of
from llava.eval.results.runs import Run
from llava.eval.results.samples import Units, caption_texts, read_log, units_of

MEAN = "Mean"
# MMMU's score is rounded to five decimals by lmms-eval, and a percent has a hundred times as many.
_SAME = 1e-3
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class _Drawn:
    value: float
    draws: np.ndarray
    asked: tuple


def with_evidence(rows: Sequence[Row], seed: int = 0, draws: int = DRAWS) -> tuple[list[Row], list[str]]:
    """Give measured rows their intervals and tests.

    Parameters
    ----------
    rows : sequence of Row
        Relative means included.
    seed, draws : int
        The same give the same intervals.

    Returns
    -------
    rows : list of Row
    remarks : list of str
        Why a column has none.
    """
    remarks: list[str] = []
    drawn: list[dict[str, _Drawn]] = [{} for _ in rows]
    for column in COLUMNS:
        for number, found in _drawn(column, rows, seed, draws, remarks).items():
            drawn[number][column.key] = found
    relative = {}
    for number, row in enumerate(rows):
        full = unpruned_of(row, rows)
        relative[number] = None if full is None else _relative(row, drawn[number], full, drawn[_place(rows, full)])
    by_row = {id(row): (drawn[number], relative[number]) for number, row in enumerate(rows)}
    return [
        row if row.published or not drawn[number] else replace(row, evidence=_evidence(row, rows, by_row))
        for number, row in enumerate(rows)
    ], list(dict.fromkeys(remarks))


def _evidence(row: Row, rows: Sequence[Row], by_row: Mapping[int, tuple]) -> Evidence:
    own, relative = by_row[id(row)]
    intervals = {key: interval(found.draws) for key, found in own.items()}
    if relative is not None and row.method != "unpruned":
        intervals[MEAN] = interval(relative.draws)
    full = unpruned_of(row, rows)
    against_full = {} if full is None or full is row else _against(own, relative, [by_row[id(full)]])
    others = _randoms(row, rows)
    against_random = _against(own, relative, [by_row[id(other)] for other in others]) if others else {}
    rivals = [other for other in _peers(row, rows) if other is not row and other.relative is not None]
    best = max(rivals, key=lambda other: other.relative, default=None)
    against_best = {} if best is None else _against(own, relative, [by_row[id(best)]])
    return Evidence(intervals, against_full, against_random, against_best.get(MEAN))


def _against(
    own: Mapping[str, _Drawn], relative: _Drawn | None, others: Sequence[tuple[Mapping[str, _Drawn], _Drawn | None]]
) -> dict[str, Comparison]:
    """Comparisons with the mean of other rows, in the columns that were asked of all alike."""
    found = {}
    for key, mine in own.items():
        theirs = [drawn[key] for drawn, _ in others if key in drawn]
        if len(theirs) == len(others) and all(other.asked == mine.asked for other in theirs):
            found[key] = _compared(mine, theirs)
    means = [mean for _, mean in others if mean is not None]
    if relative is not None and len(means) == len(others) and all(mean.asked == relative.asked for mean in means):
        found[MEAN] = _compared(relative, means)
    return found


def _compared(mine: _Drawn, theirs: Sequence[_Drawn]) -> Comparison:
    value = sum(other.value for other in theirs) / len(theirs)
    return compare(mine.value, mine.draws, value, np.mean([other.draws for other in theirs], axis=0))


def _randoms(row: Row, rows: Sequence[Row]) -> list[Row]:
    """Random at the row's budget, all of its seeds."""
    return [] if row.family == "random" else [other for other in _peers(row, rows) if other.family == "random"]


def _peers(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The rows of the same model and budget, this one among them."""
    groups = same_budget([other for other in rows if other.model == row.model])
    return [other for group in groups if any(one is row for one in group) for other in group]


def _relative(row: Row, own: Mapping[str, _Drawn], full: Row, full_drawn: Mapping[str, _Drawn]) -> _Drawn | None:
    """Draws of the relative mean, or None.

    It needs all the columns that the mean is taken over, on the same units, and no draw in which the unpruned model
    scores nothing.
    """
    keys = [key for key, score in full.scores.items() if score and key in row.scores]
    if row.relative is None or any(
        key not in own or key not in full_drawn or own[key].asked != full_drawn[key].asked for key in keys
    ):
        return None
    if any((full_drawn[key].draws <= 0).any() for key in keys):
        return None
    shares = [own[key].draws / full_drawn[key].draws for key in keys]
    return _Drawn(row.relative, 100 * np.mean(shares, axis=0), tuple(own[key].asked for key in keys))


def _drawn(column: Column, rows: Sequence[Row], seed: int, draws: int, remarks: list[str]) -> dict[int, _Drawn]:
    """A column's draws of each row that has a usable log: the mean over a row's runs."""
    runs = [(number, run) for number, row in enumerate(rows) for run in row.runs]
    units = _units(column, [run for _, run in runs], remarks)
    groups: dict[tuple, list[int]] = {}
    for place, ((_, run), one) in enumerate(zip(runs, units, strict=True)):
        if one is not None:
            groups.setdefault((run.facts().get("data"), column.task_in(run.tasks), one.names), []).append(place)
    found: dict[int, list[_Drawn]] = {}
    for asked, places in groups.items():
        scores = draw_scores([units[place] for place in places], column.key, seed, draws)
        for place, drawn in zip(places, scores, strict=True):
            one = _Drawn(column.scale * units[place].value, column.scale * drawn, asked)
            found.setdefault(runs[place][0], []).append(one)
    return {
        number: _Drawn(
            sum(one.value for one in parts) / len(parts), np.mean([one.draws for one in parts], axis=0), parts[0].asked
        )
        for number, parts in found.items()
        if len(parts) == len(rows[number].runs)
    }


def _units(column: Column, runs: Sequence[Run], remarks: list[str]) -> list[Units | None]:
    logs = []
    for run in runs:
        task = column.task_in(run.tasks)
        path = None if task is None else run.log(task)
        logs.append(None if path is None else _told(column, run, remarks, lambda path=path: read_log(path)))
    ciders: list[list[float] | None] = [None] * len(runs)
    if column.captions and any(logs):
        texts = [
            None if log is None else _told(column, run, remarks, lambda log=log: caption_texts(column, log))
            for run, log in zip(runs, logs, strict=True)
        ]
        try:
            scored = iter(cider_of_runs([pair for pair in texts if pair is not None]))
            ciders = [None if pair is None else next(scored) for pair in texts]
        except CaptionsCannotBeScored as error:
            remarks.append(f"No intervals of the captions: {error}.")
            return [None] * len(runs)
    units: list[Units | None] = []
    for run, log, cider in zip(runs, logs, ciders, strict=True):
        if log is None or (cider is None and column.captions):
            units.append(None)
            continue
        one = _told(column, run, remarks, lambda log=log, cider=cider: units_of(column, log, cider))
        units.append(one if one is None or _agrees(column, run, one, remarks) else None)
    return units


def _told(column: Column, run: Run, remarks: list[str], read: Callable[[], _Read]) -> _Read | None:
    """What a log gives; where it is not as expected, None, and a remark."""
    try:
        return read()
    except (AttributeError, IndexError, KeyError, OSError, OverflowError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        remarks.append(f"No interval of {column.key}, {run.name}: its log is not as expected ({reason}).")
        return None


def _agrees(column: Column, run: Run, units: Units, remarks: list[str]) -> bool:
    """Whether a log gives the score that stands in the results: otherwise it is not the log of these results."""
    recorded = column.scale * run.tasks[column.task_in(run.tasks)]["metrics"][column.metric]
    again = column.scale * units.value
    if abs(recorded - again) <= _SAME * max(1.0, abs(recorded)):
        return True
    remarks.append(
        f"No interval of {column.key}, {run.name}: the log gives {again:.4g}, the results say {recorded:.4g}."
    )
    return False


def _place(rows: Sequence[Row], wanted: Row) -> int:
    return next(number for number, row in enumerate(rows) if row is wanted)
