"""From a per-sample log to the parts of a score that can be resampled: units, and what each adds to the metric.

Every metric of the table is a function of sums over units (see docs/evidence.md), so that a bootstrap only has to sum.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava.benchmarks import Benchmark as Column

Samples = Sequence[Mapping[str, Any]]
Questions = list[tuple[str, float]]
HALF = 0.5


@dataclass(frozen=True)
class Units:
    """One task's answers, in the units that are drawn.

    Attributes
    ----------
    names : tuple of str
        Two runs with the same names have the same questions.
    parts : ndarray (units, parts), float64
        What each unit adds to the sums.
    score : callable
        (draws, parts) sums -> (draws,) scores, on the framework's scale.
    strata : ndarray (units,), int
        Units are drawn within their stratum; all 0 for most benchmarks.
    """

    names: tuple[str, ...]
    parts: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]
    strata: np.ndarray

    @property
    def value(self) -> float:
        """The score of the units as they are."""
        return float(self.score(self.parts.sum(axis=0, keepdims=True))[0])


def read_log(path: Path) -> list[dict[str, Any]]:
    """The samples of a log, in its order; a `ValueError` names a line that cannot be read."""
    samples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                samples.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, cannot be read: {error}") from None
    return samples


def caption_texts(column: Column, samples: Samples) -> tuple[list[str], list[list[str]]]:
    """Predictions and references of a caption benchmark's samples."""
    records = [sample[column.logged] for sample in samples]
    return [record["pred"] for record in records], [record["answer"] for record in records]


def units_of(column: Column, samples: Samples, cider: Sequence[float] | None = None) -> Units:
    """The units of one column, from the samples of a log; a `ValueError` if no sample counts in this column.

    ``cider`` is that of each sample, for caption benchmarks (see `llava.eval.results.cider`).
    """
    if cider is not None:
        scored = sorted(zip(samples, cider, strict=True), key=lambda pair: pair[0]["doc_id"])
        return _means([_name(sample) for sample, _ in scored], [score for _, score in scored])
    counted = _counted(column, samples)
    if column.reader in _OTHER_UNITS:
        return _OTHER_UNITS[column.reader](column, counted)
    units = _means(*zip(*_questions(column, counted), strict=True))
    return replace(units, score=lambda sums: 100 * _mean(sums)) if column.reader == "mmbench" else units


def right_answers(column: Column, samples: Samples) -> dict[str, bool]:
    """Which questions were answered correctly, by name, whatever the benchmark's metric is; empty for captions.

    A score between 0 and 1 (OKVQA's share of annotators) counts from one half on; an MMB question has to be answered
    correctly in every order of its options; MME's and POPE's are counted one by one.
    """
    if column.captions:
        return {}
    return {name: score >= HALF for name, score in _questions(column, _counted(column, samples))}


def units_of_questions(right: Mapping[str, bool], names: Sequence[str]) -> Units:
    """Some questions as units, whose score is the share that was answered correctly."""
    return _means(names, [right[name] for name in names])


def _counted(column: Column, samples: Samples) -> Samples:
    counted = [sample for sample in samples if column.logged in sample]
    if not counted:
        raise ValueError(f"{column.key}: no sample has {column.logged}")
    return sorted(counted, key=lambda sample: sample["doc_id"])


def _questions(column: Column, samples: Samples) -> Questions:
    """Each question and its own score, 0 to 1."""
    if column.reader == "mmbench":
        return _in_every_order([sample[column.logged] for sample in samples])
    return [(_name(sample), float(_SCORES[column.reader](sample[column.logged]))) for sample in samples]


def _answer(record: Any) -> float:
    return record["score"] if isinstance(record, Mapping) else record


def _same_letter(record: Mapping[str, Any]) -> bool:
    return record["pred"].lower().strip() == record["answer"].lower().strip()


def _mmmu_right(record: Mapping[str, Any]) -> bool:
    if record["question_type"] == "multiple-choice" and isinstance(record["answer"], str):
        return record["answer"] in record["parsed_pred"]
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    return evaluate_mmmu([record])[1]["acc"] == 1


def _in_every_order(records: Sequence[Mapping[str, Any]]) -> Questions:
    """MMBench's questions: correct if answered correctly in every order of the options."""
    circles: dict[int, list[bool]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record["index"]):
        circles[int(record["index"]) % 1_000_000].append(_mmbench_letter(record) == record["answer"])
    return [(str(index), all(right)) for index, right in circles.items()]


def _mmbench_letter(record: Mapping[str, Any]) -> str | None:
    if record["prediction"] in set("ABCDE"):
        return record["prediction"]
    # Any other answer is read as lmms-eval reads it.
    import pandas
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    evaluator, item = MMBench_Evaluator(), pandas.Series(record)
    return evaluator.prefetch_answer(item) or extract_mcq_answer(
        record["prediction"], choices=sorted(evaluator.build_choices(item))
    )


def _pope(column: Column, samples: Samples) -> Units:
    said = [(sample[column.logged]["ground_truth"], sample[column.logged]["prediction"]) for sample in samples]
    kinds = (("yes", "yes"), ("no", "yes"), ("yes", "no"))
    parts = np.array([[pair == kind for kind in kinds] for pair in said], dtype=float)
    return Units(tuple(map(_name, samples)), parts, _f1, np.zeros(len(said), dtype=int))


def _f1(sums: np.ndarray) -> np.ndarray:
    true_positive, false_positive, false_negative = sums.T
    whole = 2 * true_positive + false_positive + false_negative
    return np.divide(2 * true_positive, whole, out=np.zeros_like(whole), where=true_positive > 0)


def _mme(column: Column, samples: Samples) -> Units:
    images: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in (sample[column.logged] for sample in samples):
        images[record["category"], record["question_id"]].append(record["score"])
    images = dict(sorted(images.items()))
    categories = sorted({category for category, _ in images})
    strata = np.array([categories.index(category) for category, _ in images])
    points = np.array([100 * sum(scores) / len(scores) + 100 * all(scores) for scores in images.values()])
    own = strata[:, None] == np.arange(len(categories))
    parts = np.concatenate([points[:, None] * own, own], axis=1).astype(float)
    return Units(tuple(f"{category}: {name}" for category, name in images), parts, _sum_of_means, strata)


def _sum_of_means(sums: np.ndarray) -> np.ndarray:
    points, images = np.split(sums, 2, axis=1)
    return (points / images).sum(axis=1)


def _means(names: Sequence[str], values: Sequence[float]) -> Units:
    parts = np.stack([np.asarray(values, dtype=float), np.ones(len(names))], axis=1)
    return Units(tuple(names), parts, _mean, np.zeros(len(names), dtype=int))


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def _name(sample: Mapping[str, Any]) -> str:
    return f"{sample['doc_id']}: {sample.get('target', '')}"


_SCORES: dict[str, Callable[[Any], float]] = {
    "answers": _answer,
    "letters": _same_letter,
    "mme": _answer,
    "mmmu": _mmmu_right,
    "pope": lambda record: record["ground_truth"] == record["prediction"],
}
"""By a column's reader: a question's score from its logged record."""
_OTHER_UNITS: dict[str, Callable[[Column, Samples], Units]] = {"mme": _mme, "pope": _pope}
"""Where the benchmark's score is no mean over questions."""
