"""What a table's differences are worth: 95 % intervals, and paired tests against other rows, from the per-sample logs.

A benchmark's units are drawn again, the same draws for every run that was asked the same.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 13 (percentile interval) and 16 (test: the
distribution of differences, shifted to no difference).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar
from zlib import crc32

import numpy as np

from llava.benchmarks import Benchmark as Column
from llava.benchmarks import columns_of
from llava.eval.results.cider import CaptionsCannotBeScored, cider_of_runs
from llava.eval.results.rows import MEAN, UNPRUNED, Row, same_budget, unpruned_of
from llava.eval.results.runs import Run
from llava.eval.results.samples import (
    Units,
    caption_texts,
    read_log,
    right_answers,
    units_of,
    units_of_questions,
)

DRAWS = 2000
LEVEL = 0.95
_AT_ONCE = 1 << 22
# MMMU's score is rounded to five decimals by lmms-eval, and a percent has a hundred times as many.
_SAME = 1e-3
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Comparison:
    """A difference between two runs on the same units: as measured, its 95 % interval, and the two-sided p of none.

    p is not corrected for the number of tests.
    """

    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Evidence:
    """Of one row; columns without a usable log are missing.

    Attributes
    ----------
    intervals : dict of (low, high)
        By column key, and "Mean" (the relative mean, in percent).
    unpruned, random : dict of Comparison
        Against the same model unpruned, and against Random at the same budget, by column key and "Mean".
    best_other : Comparison, or None
        Of the relative mean, against the best other row at the same budget.
    shares : dict of (low, high)
        Of the score relative to unpruned, in percent, by column key and "Mean".
    """

    intervals: Mapping[str, tuple[float, float]]
    unpruned: Mapping[str, Comparison]
    random: Mapping[str, Comparison]
    best_other: Comparison | None = None
    shares: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Drawn:
    """A score, its draws, and what was asked: scores of the same units are compared draw by draw."""

    value: float
    draws: np.ndarray
    asked: tuple

    @classmethod
    def mean(cls, several: Sequence[_Drawn]) -> _Drawn:
        value = sum(one.value for one in several) / len(several)
        return cls(value, np.mean([one.draws for one in several], axis=0), several[0].asked)


Scores = dict[str, _Drawn]
"""A row's drawn scores by column key, and "Mean"."""


def draw_scores(group: Sequence[Units], label: str, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Scores on resampled units, the same units for all of a group.

    Parameters
    ----------
    group : sequence of Units
        With the same names.
    label : str
        The benchmark's name: another one draws otherwise.
    seed, draws : int

    Returns
    -------
    ndarray (len(group), draws), float64
    """
    random = np.random.default_rng([seed, crc32(label.encode())])
    units = len(group[0].names)
    strata = group[0].strata
    members = [np.flatnonzero(strata == stratum) for stratum in range(strata.max() + 1)]
    scores = np.empty((len(group), draws))
    step = max(1, _AT_ONCE // units)
    for start in range(0, draws, step):
        number = min(step, draws - start)
        counts = np.empty((number, units))
        for inside in members:
            counts[:, inside] = random.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), size=number)
        for row, one in enumerate(group):
            scores[row, start : start + number] = one.score(counts @ one.parts)
    return scores


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The percentile interval of draws, to six decimals: what lies beyond is the order of a machine's sums."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return round(float(low), 6), round(float(high), 6)


def compare(value: float, draws: np.ndarray, other: float, other_draws: np.ndarray) -> Comparison:
    """A run against another, both drawn on the same units."""
    difference, drawn = value - other, draws - other_draws
    # Sums of the same units in another order differ in the last digits.
    beyond = np.abs(drawn - difference) >= abs(difference) - 1e-9
    p = (1 + int(beyond.sum())) / (1 + len(drawn))
    return Comparison(round(difference, 6), *interval(drawn), round(p, 6))


def with_evidence(rows: Sequence[Row], seed: int = 0, draws: int = DRAWS) -> tuple[list[Row], list[str]]:
    """Give measured rows, relative means included, their intervals and tests.

    Returns
    -------
    rows : list of Row
    remarks : list of str
        Why a column has none.
    """
    remarks: list[str] = []
    return graded(rows, drawn_scores(rows, seed, draws, remarks)), list(dict.fromkeys(remarks))


def drawn_scores(
    rows: Sequence[Row], seed: int, draws: int, remarks: list[str], only: Mapping[str, Sequence[str]] | None = None
) -> list[Scores]:
    """Each row's scores and their draws, where it has a usable log, by column key.

    With ``only``, the share of right answers in percent, among the questions of these names by column key.
    """
    scores: list[Scores] = [{} for _ in rows]
    for column in dict.fromkeys(column for row in rows for run in row.runs for column in columns_of(run.tasks)):
        if only is None or only.get(column.key):
            asked = None if only is None else only[column.key]
            for number, found in _drawn(column, rows, seed, draws, remarks, asked).items():
                scores[number][column.key] = found
    return scores


def graded(rows: Sequence[Row], scores: Sequence[Scores]) -> list[Row]:
    """Rows with the evidence that their drawn scores give."""
    of_row = {id(row): own for row, own in zip(rows, scores, strict=True)}
    means = {id(row): _relative(row, rows, of_row) for row in rows}
    drawn = {key: own | ({MEAN: means[key]} if means[key] else {}) for key, own in of_row.items()}
    return [
        row if row.published or not of_row[id(row)] else replace(row, evidence=_evidence(row, rows, drawn))
        for row in rows
    ]


def _evidence(row: Row, rows: Sequence[Row], drawn: Mapping[int, Scores]) -> Evidence:
    def against(others: Sequence[Row | None]) -> dict[str, Comparison]:
        return _against(own, [drawn[id(other)] for other in others if other is not None and other is not row])

    own, full = drawn[id(row)], unpruned_of(row, rows)
    groups = same_budget([other for other in rows if other.model == row.model])
    peers = [other for group in groups if any(one is row for one in group) for other in group]
    rivals = [other for other in peers if other is not row and other.relative is not None]
    intervals = {key: interval(one.draws) for key, one in own.items() if key != MEAN or row.method != UNPRUNED}
    return Evidence(
        intervals,
        against([full]),
        {} if row.family == "random" else against([other for other in peers if other.family == "random"]),
        against([max(rivals, key=lambda other: other.relative, default=None)]).get(MEAN),
        {} if full is None or full is row else _shares(own, drawn[id(full)]),
    )


def _shares(own: Scores, full: Scores) -> dict[str, tuple[float, float]]:
    """Intervals of each score relative to the unpruned one, in percent; the relative mean's is its own."""
    shares = {MEAN: interval(own[MEAN].draws)} if MEAN in own else {}
    for key in own.keys() & full.keys() - {MEAN}:
        if own[key].asked == full[key].asked and (full[key].draws > 0).all():
            shares[key] = interval(100 * own[key].draws / full[key].draws)
    return shares


def _against(own: Scores, others: Sequence[Scores]) -> dict[str, Comparison]:
    """Comparisons with the mean of other rows, in the columns that were asked of all alike."""
    found = {}
    for key, mine in own.items():
        theirs = [scores[key] for scores in others if key in scores and scores[key].asked == mine.asked]
        if theirs and len(theirs) == len(others):
            mean = _Drawn.mean(theirs)
            found[key] = compare(mine.value, mine.draws, mean.value, mean.draws)
    return found


def _relative(row: Row, rows: Sequence[Row], drawn: Mapping[int, Scores]) -> _Drawn | None:
    """Draws of the relative mean, or None.

    It needs all the columns that the mean is taken over, on the same units, and no draw in which the unpruned model
    scores nothing.
    """
    full = unpruned_of(row, rows)
    if full is None or row.relative is None:
        return None
    own, other = drawn[id(row)], drawn[id(full)]
    keys = [key for key, score in full.scores.items() if score and key in row.scores]
    for key in keys:
        if key not in own or key not in other or own[key].asked != other[key].asked or (other[key].draws <= 0).any():
            return None
    shares = [own[key].draws / other[key].draws for key in keys]
    return _Drawn(row.relative, 100 * np.mean(shares, axis=0), tuple(own[key].asked for key in keys))


def _drawn(
    column: Column, rows: Sequence[Row], seed: int, draws: int, remarks: list[str], only: Sequence[str] | None
) -> dict[int, _Drawn]:
    """A column's draws of each row that has a usable log: the mean over a row's runs."""
    runs = [(number, run) for number, row in enumerate(rows) for run in row.runs]
    units = _units(column, [run for _, run in runs], remarks, only)
    scale = column.scale if only is None else 100.0
    groups: dict[tuple, list[tuple[int, Units]]] = {}
    for (number, run), one in zip(runs, units, strict=True):
        if one is not None:
            asked = run.metadata().get("data"), column.task_in(run.tasks), one.names
            groups.setdefault(asked, []).append((number, one))
    found: dict[int, list[_Drawn]] = {}
    for asked, members in groups.items():
        scores = draw_scores([one for _, one in members], column.key, seed, draws)
        for (number, one), drawn in zip(members, scores, strict=True):
            found.setdefault(number, []).append(_Drawn(scale * one.value, scale * drawn, asked))
    return {number: _Drawn.mean(parts) for number, parts in found.items() if len(parts) == len(rows[number].runs)}


def _units(
    column: Column, runs: Sequence[Run], remarks: list[str], only: Sequence[str] | None = None
) -> list[Units | None]:
    """A column's units of each run; None, and a remark, where there is no log that gives the recorded score.

    With ``only``, the questions of these names are the units.
    """

    def tried(run: Run, read: Callable[[], _Read]) -> _Read | None:
        try:
            return read()
        except (AttributeError, IndexError, KeyError, OSError, OverflowError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
            remarks.append(f"No interval of {column.key}, {run.name}: its log is not as expected ({reason}).")
            return None

    logs = {}
    for run in runs:
        task = column.task_in(run.tasks)
        path = None if task is None else run.log(task)
        logs[id(run)] = path and tried(run, lambda path=path: read_log(path))
    ciders: dict[int, list[float]] = {}
    if column.captions:
        texts = {
            id(run): tried(run, lambda run=run: caption_texts(column, logs[id(run)])) for run in runs if logs[id(run)]
        }
        texts = {key: pair for key, pair in texts.items() if pair is not None}
        try:
            ciders = dict(zip(texts, cider_of_runs(list(texts.values())), strict=True)) if texts else {}
        except CaptionsCannotBeScored as error:
            remarks.append(f"No intervals of the captions: {error}.")
    units: list[Units | None] = []
    for run in runs:
        log, cider = logs[id(run)], ciders.get(id(run))
        usable = log is not None and (cider is not None or not column.captions)
        one = tried(run, lambda log=log, cider=cider: units_of(column, log, cider)) if usable else None
        one = one if one and _agrees(column, run, one, remarks) else None
        if one and only is not None:
            one = tried(run, lambda log=log: units_of_questions(right_answers(column, log), only))
        units.append(one)
    return units


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
