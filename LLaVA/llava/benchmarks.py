"""The benchmarks of the tables: each is declared here, and nowhere else. Imports nothing beyond the standard library.

A table's column, a suite's task, the papers' FLOPs, the need for Java, figures and the embedded data sets all read
`BENCHMARKS`: to add a benchmark is to add an entry.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

PAPER, DOCUMENTS = "paper", "documents"
"""The groups: of the OTPrune paper's table, and of what has to be read."""


@dataclass(frozen=True)
class Data:
    """A benchmark's data set in the embedded suite, under the name of the real one.

    Attributes
    ----------
    folder : str
        Below the suite's root.
    config, split : str
        What ``load_dataset(root / folder, config, split=split)`` takes.
    image_config : str, or None
        The configuration that holds the images, where it is another.
    """

    folder: str
    config: str
    split: str
    image_config: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, and the metric that papers print of it.

    Attributes
    ----------
    key : str
        The column's short name, as in the papers.
    name : str
        lmms-eval's task of this name defines it.
    metric : str
        As in lmms-eval's results: a filter's name follows a comma.
    folder : str
        Where below lmms-eval's tasks the definition is.
    variant : str, or None
        lmms-eval's task that is evaluated instead, if ``name`` cannot be.
    group : str
        A table shows all columns of the groups that it has a score of.
    scale : float
        What the framework's value is multiplied with to be read like the papers' (percent, CIDEr, MME's points).
    digits : int
        Decimals shown.
    captions : bool
        Scored as captions are: by CIDEr, with Java.
    in_pairs : bool
        Two neighbouring documents are scored together.
    reader : str
        How a log of samples is read (`llava.eval.results.samples`).
    tokens : (int, int), or None
        What papers average FLOPs over: text tokens (no system prompt), and LLaVA-1.6's visual tokens.
        Source: DivPrune, CVPR 2025, and OTPrune, arXiv 2602.20205.
    data : Data, or None
        Its embedded counterpart.
    """

    key: str
    name: str
    metric: str
    folder: str
    variant: str | None = None
    group: str = PAPER
    scale: float = 100.0
    digits: int = 2
    captions: bool = False
    in_pairs: bool = False
    reader: str = "answers"
    tokens: tuple[int, int] | None = None
    data: Data | None = None

    @property
    def task(self) -> str:
        """lmms-eval's task that is evaluated."""
        return self.variant or self.name

    @property
    def logged(self) -> str:
        """The metric in a log of samples."""
        return self.metric.partition(",")[0]

    @property
    def mini(self) -> str | None:
        """The embedded task, or None."""
        return None if self.data is None else f"mini_{self.name}"

    @property
    def tasks(self) -> tuple[str, ...]:
        """All names that results of it may stand under."""
        return tuple(task for task in (self.name, self.variant, self.mini) if task)

    def task_in(self, tasks: Mapping[str, Any]) -> str | None:
        """The task among a run's results that this column is read from, or None."""
        values = {task: tasks[task]["metrics"].get(self.metric) for task in self.tasks if task in tasks}
        # lmms-eval gives nan where there was nothing to score.
        found = [task for task, value in values.items() if value is not None and math.isfinite(value)]
        return found[-1] if found else None


def _captions(key: str, name: str, metric: str, folder: str, **more: Any) -> Benchmark:
    return Benchmark(key, name, metric, folder, scale=1.0, captions=True, **more)


def _data(folder: str, config: str, split: str, image_config: str | None = None) -> Data:
    return Data(f"lmms-lab-encoder/{folder}", config, split, image_config)


def _document(key: str, name: str, metric: str, folder: str, **more: Any) -> Benchmark:
    return Benchmark(key, name, metric, folder, group=DOCUMENTS, **more)


BENCHMARKS = (
    _captions(
        "COCO",
        "coco2017_cap_val",
        "coco_CIDEr",
        "coco_cap",
        tokens=(15, 2225),
        data=_data("COCO-Caption2017", "default", "val"),
    ),
    _captions(
        "Flickr30k",
        "flickr30k_test",
        "flickr_CIDEr",
        "flickr30k",
        tokens=(15, 1922),
        data=_data("flickr30k", "default", "test"),
    ),
    Benchmark(
        "GQA",
        "gqa",
        "exact_match",
        "gqa",
        tokens=(23, 2239),
        data=_data("GQA", "testdev_balanced_instructions", "testdev", "testdev_balanced_images"),
    ),
    Benchmark(
        "MMB",
        "mmbench_en_dev",
        "gpt_eval_score",
        "mmbench",
        # The other asks a paid judge about answers that it cannot read.
        variant="mmbench_en_dev_static",
        scale=1.0,
        reader="mmbench",
        tokens=(83, 1927),
        data=_data("MMBench", "en", "dev"),
    ),
    Benchmark(
        "MME-P",
        "mme",
        "mme_perception_score",
        "mme",
        scale=1.0,
        digits=0,
        in_pairs=True,
        reader="mme",
        tokens=(25, 2108),
        data=_data("MME", "default", "test"),
    ),
    Benchmark(
        "MMMU",
        "mmmu_val",
        "mmmu_acc",
        "mmmu",
        reader="mmmu",
        tokens=(113, 1882),
        data=_data("MMMU", "default", "validation"),
    ),
    _captions(
        "NoCaps",
        "nocaps_val",
        "nocaps_CIDEr",
        "nocaps",
        tokens=(15, 2292),
        data=_data("NoCaps", "default", "validation"),
    ),
    Benchmark(
        "OKVQA",
        "ok_vqa_val2014",
        "exact_match",
        "ok_vqa",
        tokens=(39, 2249),
        data=_data("OK-VQA", "default", "val2014"),
    ),
    Benchmark(
        "POPE",
        "pope",
        "pope_f1_score",
        "pope",
        reader="pope",
        tokens=(21, 2250),
        data=_data("POPE", "default", "test"),
    ),
    Benchmark(
        "SQA",
        "scienceqa_img",
        "exact_match",
        "scienceqa",
        tokens=(91, 1598),
        data=_data("ScienceQA", "ScienceQA-IMG", "test"),
    ),
    Benchmark(
        "SEED-I",
        "seedbench",
        "seed_image",
        "seedbench",
        reader="letters",
        tokens=(57, 2116),
        data=_data("SEED-Bench", "default", "test"),
    ),
    _document("TextVQA", "textvqa_val", "exact_match", "textvqa", data=_data("textvqa", "default", "validation")),
    _document("ChartQA", "chartqa", "relaxed_overall", "chartqa", data=_data("ChartQA", "default", "test")),
    _document("DocVQA", "docvqa_val", "anls", "docvqa", data=_data("DocVQA", "DocVQA", "validation")),
    _document("InfoVQA", "infovqa_val", "anls", "infovqa"),
    _document(
        "OCRBench",
        "ocrbench",
        "ocrbench_accuracy",
        "ocrbench",
        data=Data("echo840/OCRBench", "default", "test"),
    ),
    _document("AI2D", "ai2d", "exact_match,flexible-extract", "ai2d"),
)
"""In the order of the tables."""


def benchmark_of(task: str) -> Benchmark | None:
    """The benchmark that a task of lmms-eval belongs to, the embedded ones included; None for a task of no table."""
    return next((benchmark for benchmark in BENCHMARKS if task in benchmark.tasks), None)


def other_benchmark(task: str, metric: str = "") -> Benchmark:
    """A task of no table as a column of its own: its score as lmms-eval gives it."""
    return Benchmark(task, task, metric, "", group=task, scale=1.0, digits=3)


def columns_of(tasks: Mapping[str, Any]) -> tuple[Benchmark, ...]:
    """All columns, and one more for each task of no table among results: of its first metric."""
    others = {task: result["metrics"] for task, result in tasks.items() if benchmark_of(task) is None}
    return BENCHMARKS + tuple(other_benchmark(task, next(iter(metrics))) for task, metrics in others.items() if metrics)


def shown_columns(scored: Collection[str]) -> tuple[Benchmark, ...]:
    """The columns of a table whose rows have scores under these keys: whole groups, the paper's without any score."""
    known = {benchmark.key: benchmark for benchmark in BENCHMARKS}
    groups = {known[key].group for key in scored if key in known} or ({PAPER} if not scored else set())
    others = tuple(other_benchmark(key) for key in sorted(scored) if key not in known)
    return tuple(benchmark for benchmark in BENCHMARKS if benchmark.group in groups) + others
