"""95 % intervals of a table's scores, and paired tests against other rows, from the per-sample logs.

A benchmark's units are resampled, with the same draws for every run that was asked the same questions.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 13 (percentile interval) and 16 (test: the
distribution of differences, shifted to no difference).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
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
_UNREADABLE = (AttributeError, IndexError, KeyError, OSError, OverflowError, TypeError, ValueError)


@dataclass(frozen=True)
class Comparison:
    """A difference between two runs on the same units, its 95 % interval, and the two-sided p (not corrected)."""

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
    """A score, its draws, and its questions: scores on the same questions are compared draw by draw."""

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
    """Scores (len(group), draws) on resampled units, the same for all of a group, whose units have the same names.

    ``label``, the benchmark's name, and ``seed`` determine the draws.
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
    """The percentile interval of draws, to six decimals: further ones depend on the machine."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return round(float(low), 6), round(float(high), 6)


def compare(value: float, draws: np.ndarray, other: float, other_draws: np.ndarray) -> Comparison:
    """Compare a run with another, both drawn on the same units."""
    difference, drawn = value - other, draws - other_draws
    # Sums of the same units in another order differ in the last digits.
    beyond = np.abs(drawn - difference) >= abs(difference) - 1e-9
    p = (1 + int(beyond.sum())) / (1 + len(drawn))
    return Comparison(round(difference, 6), *interval(drawn), round(p, 6))


def with_evidence(rows: Sequence[Row], seed: int = 0, draws: int = DRAWS) -> tuple[list[Row], list[str]]:
    """Give measured rows their intervals and tests, relative means included; also returns why a column has none."""
    remarks: list[str] = []
    return graded(drawn_scores(rows, seed, draws, remarks)), list(dict.fromkeys(remarks))


def drawn_scores(
    rows: Sequence[Row], seed: int, draws: int, remarks: list[str], only: Mapping[str, Sequence[str]] | None = None
) -> dict[Row, Scores]:
    """Each row's scores and their draws, where it has a usable log.

    With ``only``, the percentage of correct answers among the questions of these names, by column key.
    """
    scores: dict[Row, Scores] = {row: {} for row in rows}
    for column in dict.fromkeys(column for row in rows for run in row.runs for column in columns_of(run.tasks)):
        if only is None or only.get(column.key):
            names = None if only is None else only[column.key]
            for row, found in _drawn(column, rows, seed, draws, remarks, names).items():
                scores[row][column.key] = found
    return scores


def graded(scores: Mapping[Row, Scores]) -> list[Row]:
    """Rows with the evidence that their drawn scores give."""
    rows = list(scores)
    full = {row: unpruned_of(row, rows) for row in rows}
    shares = {row: _shares(own, scores[full[row]]) if full[row] else {} for row, own in scores.items()}
    drawn = {row: own | _relative(row, full[row], own, shares[row]) for row, own in scores.items()}
    budgets = same_budget(rows)

    def evidence(row: Row) -> Evidence:
        def against(*others: Row | None) -> dict[str, Comparison]:
            return _against(drawn[row], [drawn[other] for other in others if other not in (None, row)])

        peers = next((group for group in budgets if row in group), [])
        rivals = [other for other in peers if other is not row and other.relative is not None]
        spans = {key: interval(one.draws) for key, one in drawn[row].items()}
        relative = {key: interval(share) for key, share in shares[row].items()}
        relative |= {key: span for key, span in spans.items() if key == MEAN}
        return Evidence(
            {key: span for key, span in spans.items() if key != MEAN or row.method != UNPRUNED},
            against(full[row]),
            {} if row.family == "random" else against(*(other for other in peers if other.family == "random")),
            against(max(rivals, key=lambda other: other.relative, default=None)).get(MEAN),
            {} if full[row] is row else relative,
        )

    return [replace(row, evidence=evidence(row)) if own else row for row, own in scores.items()]


def _shares(own: Scores, full: Scores) -> dict[str, np.ndarray]:
    """Draws of each score in percent of the unpruned one, if the questions are the same and no draw divides by 0."""
    same = [key for key in own if key in full and own[key].asked == full[key].asked]
    return {key: 100 * own[key].draws / full[key].draws for key in same if (full[key].draws > 0).all()}


def _relative(row: Row, full: Row | None, own: Scores, shares: Mapping[str, np.ndarray]) -> Scores:
    """Draws of the relative mean, if all the columns that it is taken over have some."""
    keys = [key for key, score in full.scores.items() if score and key in row.scores] if full else []
    if row.relative is None or not all(key in shares for key in keys):
        return {}
    draws = np.mean([shares[key] for key in keys], axis=0)
    return {MEAN: _Drawn(row.relative, draws, tuple(own[key].asked for key in keys))}


def _against(own: Scores, others: Sequence[Scores]) -> dict[str, Comparison]:
    """Comparisons with the mean of other rows, in the columns whose questions were the same for all."""
    found = {}
    for key, mine in own.items():
        theirs = [scores[key] for scores in others if key in scores and scores[key].asked == mine.asked]
        if theirs and len(theirs) == len(others):
            mean = _Drawn.mean(theirs)
            found[key] = compare(mine.value, mine.draws, mean.value, mean.draws)
    return found


def _drawn(
    column: Column, rows: Sequence[Row], seed: int, draws: int, remarks: list[str], only: Sequence[str] | None
) -> dict[Row, _Drawn]:
    """A column's draws of each row that has a usable log: the mean over a row's runs."""
    runs = [(row, run) for row in rows for run in row.runs]
    units = _units(column, [run for _, run in runs], remarks, only)
    scale = column.scale if only is None else 100.0
    groups: dict[tuple, list[tuple[Row, Units]]] = {}
    for (row, run), one in zip(runs, units, strict=True):
        if one is not None:
            asked = run.metadata().get("data"), column.task_in(run.tasks), one.names
            groups.setdefault(asked, []).append((row, one))
    found: dict[Row, list[_Drawn]] = {}
    for asked, members in groups.items():
        scores = draw_scores([one for _, one in members], column.key, seed, draws)
        for (row, one), drawn in zip(members, scores, strict=True):
            found.setdefault(row, []).append(_Drawn(scale * one.value, scale * drawn, asked))
    return {row: _Drawn.mean(parts) for row, parts in found.items() if len(parts) == len(row.runs)}


def _units(column: Column, runs: Sequence[Run], remarks: list[str], only: Sequence[str] | None) -> list[Units | None]:
    """A column's units of each run; None, and a remark, where there is no log that gives the recorded score.

    With ``only``, the questions of these names are the units.
    """

    def attempt(run: Run, read: Callable[..., Any], *given: Any) -> Any:
        try:
            return read(*given)
        except _UNREADABLE as error:
            reason = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
            remarks.append(f"No interval of {column.key}, {run.name}: its log is not as expected ({reason}).")
            return None

    def units(run: Run, log: list[dict[str, Any]], cider: Sequence[float] | None) -> Units | None:
        every = units_of(column, log, cider)
        recorded = column.scale * run.tasks[column.task_in(run.tasks)]["metrics"][column.metric]
        again = column.scale * every.value
        if abs(recorded - again) > _SAME * max(1.0, abs(recorded)):  # it is not the log of these results
            said = f"the log gives {again:.4g}, the results say {recorded:.4g}"
            remarks.append(f"No interval of {column.key}, {run.name}: {said}.")
            return None
        return every if only is None else units_of_questions(right_answers(column, log), only)

    paths = [run.log(column) for run in runs]
    logs = [path and attempt(run, read_log, path) for run, path in zip(runs, paths, strict=True)]
    ciders: list[Sequence[float] | None] = [None] * len(runs)
    if column.captions:
        texts = [log and attempt(run, caption_texts, column, log) for run, log in zip(runs, logs, strict=True)]
        logs = [log if pair else None for log, pair in zip(logs, texts, strict=True)]
        try:
            scored = iter(cider_of_runs([pair for pair in texts if pair]))
            ciders = [next(scored) if pair else None for pair in texts]
        except CaptionsCannotBeScored as error:
            remarks.append(f"No intervals of the captions: {error}.")
            logs = [None] * len(runs)
    return [
        None if log is None else attempt(run, units, run, log, cider)
        for run, log, cider in zip(runs, logs, ciders, strict=True)
    ]
