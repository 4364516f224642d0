"""lmms-eval's benchmark tasks by name, the embedded ones and the published ones, where lmms-eval is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PLUGIN = "lmms_eval_otprune"
"""Package whose folder ``tasks`` defines the embedded tasks, beside lmms-eval's own."""

PUBLISHED_GROUP = "otprune_paper.yaml"


def load_tasks(name: str) -> dict[str, Any]:
    """A task, or those of a group, with their documents: task name -> task.

    Raises
    ------
    ImportError
        If lmms-eval is not installed.
    ValueError
        If it does not know the name.
    OSError
        If a task's data are neither here nor to be downloaded.
    """
    from lmms_eval.tasks import TaskManager, get_task_dict
    from loguru import logger
    from tenacity import RetryError

    folders = task_folders()
    logger.disable("lmms_eval")
    try:
        # All of lmms-eval's definitions take long to index.
        manager = TaskManager(include_defaults=False, include_path=folders, model_name="llava")
        if name not in manager.all_tasks:
            manager = TaskManager(include_path=folders, model_name="llava")
        if name not in manager.all_tasks:
            raise ValueError(f"{name} is no task that lmms-eval knows")
        return dict(_flat(get_task_dict([published_entry(name) or name], manager)))
    except RetryError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise OSError(f"the data of the task {name} cannot be had: {reason}") from None
    finally:
        logger.enable("lmms_eval")


def task_folders() -> list[str]:
    """Where lmms-eval finds the plug-in's tasks, beside its own; none without the plug-in."""
    plugin = find_spec(PLUGIN)
    return [str(Path(folder, "tasks")) for folder in plugin.submodule_search_locations] if plugin else []


def published_entry(name: str) -> dict[str, Any] | None:
    """A task as our group of published benchmarks defines it: without a login for its data. None if it does not."""
    from lmms_eval.utils import load_yaml_config

    for folder in task_folders():
        group = load_yaml_config(yaml_path=str(Path(folder, PUBLISHED_GROUP)), mode="full")
        for entry in group["task"]:
            if entry["task"] == name:
                return dict(entry)
    return None


def _flat(tasks: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in tasks.items():
        if isinstance(task, dict):
            yield from _flat(task)
        else:
            yield str(name), task
