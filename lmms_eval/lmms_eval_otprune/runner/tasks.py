"""What a task's result depends on: a recorded result is reused only if all of it is the same."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lmms_eval_otprune.tasks
from llava.benchmark_tasks import data_revision
from llava.benchmarks import benchmark_of
from llava.mini.suite import version_of
from llava.model.builder import resolve_model_path
from lmms_eval_otprune.models.fingerprint import model_fingerprint, source_digest
from lmms_eval_otprune.models.java import needs_java

from .options import Options
from .plan import Job, Plan


def task_identities(job: Job, plan: Plan, options: Options) -> dict[str, dict[str, Any]]:
    """Task -> everything that its result depends on, JSON-serialisable."""
    common = {
        "model": model_fingerprint(
            resolve_model_path(job.model), options.model_base, plan.dtype, "sdpa", job.wrapper or options.conv_template
        ),
        "pruning": None if job.pruning is None else job.pruning.to_dict(),
        "grey": job.grey,
        "limit": options.limit,
        "seed": options.seed,
        "scoring": f"lmms-eval-{version('lmms-eval')}/{source_digest(_scoring_files())}",
    }
    metrics = "all" if options.all_metrics else "table"
    return {
        task: {
            "task": task,
            **common,
            "data": data_version(task) + data_revision(task),
            **({"metrics": metrics} if needs_java(task) else {}),
        }
        for task in plan.suite.tasks
    }


def _scoring_files() -> list[Path]:
    folder = Path(lmms_eval_otprune.tasks.__file__).parent
    return sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml"))


def data_versions(tasks: Iterable[str]) -> str:
    """Of all the data sets of a run; answers that were recorded for another version are not looked at."""
    return "+".join(sorted({data_version(task) for task in tasks}))


def data_version(task: str) -> str:
    """Of an embedded data set; the published ones stay what they are."""
    benchmark = benchmark_of(task)
    return version_of(benchmark.group) if benchmark and task == benchmark.mini else "published"
