"""Samples from lmms-eval's benchmark tasks, where lmms-eval is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.fitprune.samples import Question, Source, chosen, digest_of

PLUGIN_TASKS = "lmms_eval_otprune_tasks"
"""Package whose folder defines the embedded tasks, beside lmms-eval's own."""

PUBLISHED_GROUP = "otprune_paper.yaml"


def open_tasks(name: str, count: int, seed: int) -> Source:
    """Questions about one picture of a task, or in turn of a group's tasks.

    Raises
    ------
    ValueError
        If lmms-eval is not there, does not know the name, or the task asks nothing about exactly one picture.
    OSError
        If the task's data are neither here nor to be downloaded.
    """
    tasks = _load(name)
    places = list(_places(tasks, count, seed))
    if not places:
        raise ValueError(f"--data {name}: the task has no question about exactly one picture")

    def read(number: int) -> Question:
        task, place = places[number]
        document = tasks[task].eval_docs[place]
        (image,) = _pictures(tasks[task], document)
        return f"{task}, document {place}", _question(tasks[task], document), image

    questions = [_question(tasks[task], tasks[task].eval_docs_no_media[place]) for task, place in places]
    return Source(name, digest_of(places, questions), seed, len(places), read)


def _load(name: str) -> dict[str, Any]:
    """Task name -> task."""
    if find_spec("lmms_eval") is None:
        raise ValueError(
            f"--data {name}: neither a file nor mini, and for a benchmark task lmms-eval must be installed"
        )
    from lmms_eval.tasks import TaskManager, get_task_dict
    from loguru import logger
    from tenacity import RetryError

    plugin = find_spec(PLUGIN_TASKS)
    folders = list(plugin.submodule_search_locations) if plugin else []
    logger.disable("lmms_eval")
    try:
        # All of lmms-eval's definitions take long to index.
        manager = TaskManager(include_defaults=False, include_path=folders, model_name="llava")
        if name not in manager.all_tasks:
            manager = TaskManager(include_path=folders, model_name="llava")
        if name not in manager.all_tasks:
            raise ValueError(f"--data {name}: neither mini, nor a file, nor a task that lmms-eval knows")
        return dict(_flat(get_task_dict([_changed(name, folders)], manager)))
    except RetryError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise OSError(f"--data {name}: the task's data cannot be had: {reason}") from None
    finally:
        logger.enable("lmms_eval")


def _changed(name: str, folders: list[str]) -> str | dict[str, Any]:
    """A task as our group of published benchmarks defines it, where it does: without a login for its data."""
    from lmms_eval.utils import load_yaml_config

    for folder in folders:
        group = load_yaml_config(yaml_path=str(Path(folder, PUBLISHED_GROUP)), mode="full")
        for entry in group["task"]:
            if entry["task"] == name:
                return dict(entry)
    return name


def _flat(tasks: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in tasks.items():
        if isinstance(task, dict):
            yield from _flat(task)
        else:
            yield str(name), task


def _places(tasks: dict[str, Any], count: int, seed: int) -> Iterator[tuple[str, int]]:
    """(task, document) with one picture each, the tasks in turn."""
    left = {name: iter(chosen(len(task.eval_docs), len(task.eval_docs), seed, name)) for name, task in tasks.items()}
    for name in cycle(tasks):
        if not left or count == 0:
            return
        if name not in left:
            continue
        for place in left[name]:
            if len(_pictures(tasks[name], tasks[name].eval_docs[place])) == 1:
                count -= 1
                yield name, place
                break
        else:
            del left[name]


def _question(task: Any, document: Any) -> str:
    return task.doc_to_text(document).replace(DEFAULT_IMAGE_TOKEN, "").strip()


def _pictures(task: Any, document: Any) -> list[Image.Image]:
    found = task.doc_to_visual(document) or []
    return [picture for picture in found if isinstance(picture, Image.Image)]
