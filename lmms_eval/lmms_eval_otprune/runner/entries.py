"""How lmms-eval is asked for a task."""

from __future__ import annotations

from typing import Any

from lmms_eval.tasks import TaskManager

from llava.eval.benchmark_tasks import published_entry, task_folders
from llava.eval.results.columns import COLUMNS
from lmms_eval_otprune.models.java import needs_java
from lmms_eval_otprune.tasks.builtin import definition, definition_file

from .suites import PAPER_TASKS


def task_entry(name: str, all_metrics: bool) -> dict[str, Any]:
    """How lmms-eval is asked for a task: as it is or, if it is a published one, with our group's changes.

    Of the caption metrics only the table's is left, unless all are asked for: each of the others starts Java anew, and
    METEOR alone takes as long as a small task's answers.
    """
    entry = published_entry(name) or {"task": name}
    if needs_java(name) and not all_metrics:
        [shown] = [column.metric for column in COLUMNS if name in column.tasks]
        metrics = definition(name.removeprefix("mini_"))["metric_list"]
        entry["metric_list"] = [metric for metric in metrics if metric["metric"] == shown]
    return entry


def task_manager(tasks: list[str]) -> TaskManager:
    """Indexes the folders that are needed; all of lmms-eval's take four seconds."""
    builtin = {str(definition_file(task).parent) for task in tasks if task in PAPER_TASKS}
    return TaskManager(include_defaults=False, include_path=[*task_folders(), *sorted(builtin)], model_name="llava")
