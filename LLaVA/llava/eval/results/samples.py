"""From a per-sample log to the parts of a score that can be drawn again: units, and what each adds to the metric.

Every metric of the table is a function of sums over units, so that a bootstrap only has to sum again:

============================  ==========================================  ===========================================
benchmark                     unit                                        score
============================  ==========================================  ===========================================
GQA, OKVQA, SQA, MMMU, SEED   question                                    mean of right answers
TextVQA and other documents   question                                    mean of its score
MMB                           question with all its circular copies       mean of "all of them right"
MME-P                         image with its two questions, drawn       sum over categories of the mean of acc and
                              within its category                         acc+
POPE                          question                                    F1 from the summed counts
COCO, Flickr30k, NoCaps       image                                     mean of the images' CIDEr; document
                                                                          frequencies stay those of all references
============================  ==========================================  ===========================================
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
        Two runs with the same names were asked the same.
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
    records = [sample[column.metric] for sample in samples]
    return [record["pred"] for record in records], [record["answer"] for record in records]


def units_of(column: Column, samples: Samples, cider: Sequence[float] | None = None) -> Units:
    """The units of one column, from the samples of a log.

    ``cider`` is that of each sample, for caption benchmarks (see `llava.eval.results.cider`). If no sample counts in
    this column, it is a `ValueError`.
    """
    if cider is not None:
        scored = sorted(zip(samples, cider, strict=True), key=lambda pair: pair[0]["doc_id"])
        return _means([_name(sample) for sample, _ in scored], [score for _, score in scored])
    counted = _counted(column, samples)
    if column.reader in _OTHER_UNITS:
        return _OTHER_UNITS[column.reader](column, counted)
    return _means(*zip(*_QUESTIONS[column.reader](column, counted), strict=True))


def right_answers(column: Column, samples: Samples) -> dict[str, bool]:
    """Which questions were answered right, by name, whatever the benchmark makes of them: empty for captions.

    A score between 0 and 1 (OKVQA's share of annotators) counts from one half on; MMB's question has to be right in
    every order of its options; MME's and POPE's are counted one by one.
    """
    if column.captions:
        return {}
    return {name: score >= HALF for name, score in _QUESTIONS[column.reader](column, _counted(column, samples))}


def units_of_questions(right: Mapping[str, bool], names: Sequence[str]) -> Units:
    """Some questions as units, whose score is the share that was answered right."""
    return _means(names, [right[name] for name in names])


def _counted(column: Column, samples: Samples) -> Samples:
    counted = [sample for sample in samples if column.logged in sample]
    if not counted:
        raise ValueError(f"{column.key}: no sample has {column.logged}")
    return sorted(counted, key=lambda sample: sample["doc_id"])


def _answers(column: Column, samples: Samples) -> Questions:
    """Samples that carry their own score, alone or in a record."""
    found = [(_name(sample), sample[column.logged]) for sample in samples]
    return [(name, float(one["score"] if isinstance(one, Mapping) else one)) for name, one in found]


def _letters(column: Column, samples: Samples) -> Questions:
    """SEED: the first letter of the answer."""
    records = [(_name(sample), sample[column.metric]) for sample in samples]
    return [(name, record["pred"].lower().strip() == record["answer"].lower().strip()) for name, record in records]


def _mmmu(column: Column, samples: Samples) -> Questions:
    return [(str(sample[column.metric]["id"]), _mmmu_right(sample[column.metric])) for sample in samples]


def _mmmu_right(record: Mapping[str, Any]) -> bool:
    if record["question_type"] == "multiple-choice" and isinstance(record["answer"], str):
        return record["answer"] in record["parsed_pred"]
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    return evaluate_mmmu([record])[1]["acc"] == 1


def _mmbench(column: Column, samples: Samples) -> Questions:
    """A question counts when it is answered right in every order of its options."""
    circles: dict[int, list[bool]] = defaultdict(list)
    for record in sorted((sample[column.metric] for sample in samples), key=lambda record: record["index"]):
        circles[int(record["index"]) % 1_000_000].append(_mmbench_letter(record) == record["answer"])
    return [(str(index), all(right)) for index, right in circles.items()]


def _mmbench_percent(column: Column, samples: Samples) -> Units:
    units = _means(*zip(*_mmbench(column, samples), strict=True))
    return replace(units, score=lambda sums: 100 * _mean(sums))


def _mmbench_letter(record: Mapping[str, Any]) -> str | None:
    if record["prediction"] in set("ABCDE"):
        return record["prediction"]
    # Whatever else was said is read as lmms-eval reads it.
    import pandas
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    evaluator, item = MMBench_Evaluator(), pandas.Series(record)
    return evaluator.prefetch_answer(item) or extract_mcq_answer(
        record["prediction"], choices=sorted(evaluator.build_choices(item))
    )


def _yes_or_no(column: Column, samples: Samples) -> Questions:
    records = [(_name(sample), sample[column.metric]) for sample in samples]
    return [(name, record["ground_truth"] == record["prediction"]) for name, record in records]


def _pope(column: Column, samples: Samples) -> Units:
    said = [(sample[column.metric]["ground_truth"], sample[column.metric]["prediction"]) for sample in samples]
    kinds = (("yes", "yes"), ("no", "yes"), ("yes", "no"))
    parts = np.array([[pair == kind for kind in kinds] for pair in said], dtype=float)
    return Units(tuple(map(_name, samples)), parts, _f1, np.zeros(len(said), dtype=int))


def _f1(sums: np.ndarray) -> np.ndarray:
    true_positive, false_positive, false_negative = sums.T
    whole = 2 * true_positive + false_positive + false_negative
    return np.divide(2 * true_positive, whole, out=np.zeros_like(whole), where=true_positive > 0)


def _scored(column: Column, samples: Samples) -> Questions:
    return [(_name(sample), float(sample[column.metric]["score"])) for sample in samples]


def _mme(column: Column, samples: Samples) -> Units:
    images: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in (sample[column.metric] for sample in samples):
        images[record["category"], record["question_id"]].append(record["score"])
    images = dict(sorted(images.items()))
    categories = sorted({category for category, _ in images})
    strata = np.array([categories.index(category) for category, _ in images])
    points = np.array([100 * sum(scores) / len(scores) + 100 * all(scores) for scores in images.values()])
    place = strata[:, None] == np.arange(len(categories))
    parts = np.concatenate([points[:, None] * place, place], axis=1).astype(float)
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


_QUESTIONS: dict[str, Callable[[Column, Samples], Questions]] = {
    "answers": _answers,
    "letters": _letters,
    "mmbench": _mmbench,
    "mme": _scored,
    "mmmu": _mmmu,
    "pope": _yes_or_no,
}
"""By a column's reader: each question and its own score, 0 to 1."""
_OTHER_UNITS: dict[str, Callable[[Column, Samples], Units]] = {
    "mmbench": _mmbench_percent,
    "mme": _mme,
    "pope": _pope,
}
"""Where the benchmark's score is not the mean of those."""
