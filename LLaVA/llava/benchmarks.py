"""The benchmarks of the tables, declared here and nowhere else. Imports nothing beyond the standard library.

Columns, suites, the papers' FLOPs, the check for Java, figures and the embedded data sets all read `BENCHMARKS`: a
benchmark is added by adding an entry.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

PAPER, DOCUMENTS = "paper", "documents"
"""The groups: the OTPrune paper's table, and benchmarks with text to read."""


@dataclass(frozen=True)
class Data:
    """A benchmark's data set in the embedded suite, under the name of the real one.

    It is loaded by ``load_dataset(root / folder, config, split=split)``; ``image_config`` holds the images if it is
    another configuration.
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
        lmms-eval's task.
    metric : str
        As in lmms-eval's results, where a filter's name follows a comma.
    folder : str
        The folder of its definition below lmms-eval's tasks.
    tokens : (int, int), or None
        What papers average FLOPs over: text tokens (no system prompt), and visual tokens of LLaVA-1.6.
        Source: DivPrune, CVPR 2025, and OTPrune, arXiv 2602.20205.
    data : Data, or None
        Its embedded counterpart.
    variant : str, or None
        lmms-eval's task that is evaluated instead, if ``name`` cannot be.
    group : str
        A table shows all columns of each group that it has a score of.
    scale : float
        Factor from lmms-eval's value to the papers' scale (percent, CIDEr, MME's points).
    digits : int
        Decimals shown.
    captions : bool
        Scored as captions are: by CIDEr, with Java.
    in_pairs : bool
        Two neighbouring documents are scored together.
    reader : str
        How a log of samples is read (`llava.eval.results.samples`).
    """

    key: str
    name: str
    metric: str
    folder: str
    tokens: tuple[int, int] | None = None
    data: Data | None = None
    variant: str | None = None
    group: str = PAPER
    scale: float = 100.0
    digits: int = 2
    captions: bool = False
    in_pairs: bool = False
    reader: str = "answers"

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
        """All names that its results may have."""
        return tuple(task for task in (self.name, self.variant, self.mini) if task)

    def task_in(self, tasks: Mapping[str, Any]) -> str | None:
        """The task among a run's results that has this column's score, or None."""
        values = {task: tasks[task]["metrics"].get(self.metric) for task in self.tasks if task in tasks}
        # lmms-eval gives nan where there was nothing to score.
        found = [task for task, value in values.items() if value is not None and math.isfinite(value)]
        return found[-1] if found else None


def _data(folder: str, split: str, config: str = "default", image_config: str | None = None) -> Data:
    return Data(f"lmms-lab-encoder/{folder}", config, split, image_config)


_CAPTIONS: dict[str, Any] = {"scale": 1.0, "captions": True}
_DOCUMENT: dict[str, Any] = {"group": DOCUMENTS}
BENCHMARKS = (
    Benchmark(
        "COCO", "coco2017_cap_val", "coco_CIDEr", "coco_cap", (15, 2225), _data("COCO-Caption2017", "val"), **_CAPTIONS
    ),
    Benchmark(
        "Flickr30k", "flickr30k_test", "flickr_CIDEr", "flickr30k", (15, 1922), _data("flickr30k", "test"), **_CAPTIONS
    ),
    Benchmark(
        "GQA",
        "gqa",
        "exact_match",
        "gqa",
        (23, 2239),
        _data("GQA", "testdev", "testdev_balanced_instructions", "testdev_balanced_images"),
    ),
    # Its own name's task asks a paid judge about answers that it cannot read.
    Benchmark(
        "MMB",
        "mmbench_en_dev",
        "gpt_eval_score",
        "mmbench",
        (83, 1927),
        _data("MMBench", "dev", "en"),
        variant="mmbench_en_dev_static",
        scale=1.0,
        reader="mmbench",
    ),
    Benchmark(
        "MME-P",
        "mme",
        "mme_perception_score",
        "mme",
        (25, 2108),
        _data("MME", "test"),
        in_pairs=True,
        reader="mme",
        scale=1.0,
        digits=0,
    ),
    Benchmark("MMMU", "mmmu_val", "mmmu_acc", "mmmu", (113, 1882), _data("MMMU", "validation"), reader="mmmu"),
    Benchmark("NoCaps", "nocaps_val", "nocaps_CIDEr", "nocaps", (15, 2292), _data("NoCaps", "validation"), **_CAPTIONS),
    Benchmark("OKVQA", "ok_vqa_val2014", "exact_match", "ok_vqa", (39, 2249), _data("OK-VQA", "val2014")),
    Benchmark("POPE", "pope", "pope_f1_score", "pope", (21, 2250), _data("POPE", "test"), reader="pope"),
    Benchmark(
        "SQA", "scienceqa_img", "exact_match", "scienceqa", (91, 1598), _data("ScienceQA", "test", "ScienceQA-IMG")
    ),
    Benchmark(
        "SEED-I", "seedbench", "seed_image", "seedbench", (57, 2116), _data("SEED-Bench", "test"), reader="letters"
    ),
    Benchmark("TextVQA", "textvqa_val", "exact_match", "textvqa", data=_data("textvqa", "validation"), **_DOCUMENT),
    Benchmark("ChartQA", "chartqa", "relaxed_overall", "chartqa", data=_data("ChartQA", "test"), **_DOCUMENT),
    Benchmark("DocVQA", "docvqa_val", "anls", "docvqa", data=_data("DocVQA", "validation", "DocVQA"), **_DOCUMENT),
    Benchmark("InfoVQA", "infovqa_val", "anls", "infovqa", **_DOCUMENT),
    Benchmark(
        "OCRBench",
        "ocrbench",
        "ocrbench_accuracy",
        "ocrbench",
        data=Data("echo840/OCRBench", "default", "test"),
        **_DOCUMENT,
    ),
    Benchmark("AI2D", "ai2d", "exact_match,flexible-extract", "ai2d", **_DOCUMENT),
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
