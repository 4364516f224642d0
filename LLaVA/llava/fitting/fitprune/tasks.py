"""Samples from lmms-eval's benchmark tasks, where lmms-eval is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import cycle
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.benchmark_tasks import load_tasks
from llava.fitting.fitprune.samples import Question, Source, chosen, digest_of


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
    try:
        return load_tasks(name)
    except ValueError as error:
        raise ValueError(f"--data {name}: neither mini nor a file, and {error}") from None


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
