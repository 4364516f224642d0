"""The pictures that a pruner is trained on: a folder's, a benchmark's, or drawn ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, UnidentifiedImageError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SCENES = "scenes:"
FIRST_SCENE = 400_000_000
"""Number of the first drawn picture: behind those that llava-mini itself is trained on."""


@dataclass(frozen=True)
class Pictures:
    """Pictures by number, in an order that is the same every time.

    Attributes
    ----------
    names : sequence of str
    opener : callable
        Number -> picture of any mode.
    """

    names: Sequence[str]
    opener: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.names)

    def open(self, number: int) -> Image.Image:
        """One picture, RGB.

        Raises
        ------
        OSError
            If it cannot be read.
        """
        try:
            return self.opener(number).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise OSError(f"Cannot read the picture {self.names[number]}: {error}") from error

    def first(self, count: int | None) -> Pictures:
        """The first ``count``, or all of them."""
        return self if count is None else Pictures(self.names[:count], self.opener)


def find_pictures(source: str) -> Pictures:
    """The pictures that a text stands for.

    Parameters
    ----------
    source : str
        A folder, searched with all that is in it; "scenes:N" for N pictures of llava-mini's world, which are drawn from
        numbers that its own training never sees; else a task of lmms-eval, with each of its pictures once.

    Raises
    ------
    OSError
        If there is no such folder or task.
    ValueError
        If there is no picture in it.
    """
    if source.startswith(SCENES):
        found = _scenes(source)
    elif Path(source).is_dir():
        found = _folder(Path(source))
    elif "/" in source or source.startswith("."):
        raise OSError(f"There is no folder {source}")
    else:
        found = _task(source)
    if len(found) == 0:
        raise ValueError(f"{source} holds no picture ({', '.join(sorted(SUFFIXES))})")
    return found


def _folder(folder: Path) -> Pictures:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return Pictures([file.relative_to(folder).as_posix() for file in files], lambda number: Image.open(files[number]))


def _scenes(source: str) -> Pictures:
    from llava.mini.scenes import render, sample_scene

    text = source.removeprefix(SCENES)
    if not text.isdecimal():
        raise ValueError(f"{source}: the number of scenes must be a whole number")
    seeds = range(FIRST_SCENE, FIRST_SCENE + int(text))
    return Pictures([f"scene {seed}" for seed in seeds], lambda number: render(sample_scene(seeds[number], "train")))


def _task(name: str) -> Pictures:
    try:
        from lmms_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        raise ImportError(f"{name} is no folder, and a task needs the package lmms-eval: {error}") from error
    # The embedded benchmarks are tasks of this project's plug-in, where it is installed.
    plugin = find_spec("lmms_eval_otprune_tasks")
    folders = [] if plugin is None else list(plugin.submodule_search_locations)
    manager = TaskManager(include_path=folders, include_defaults=False, model_name="llava")
    if name not in manager.all_tasks:
        manager = TaskManager(model_name="llava")
    if name not in manager.all_tasks or name in manager.all_groups + manager.all_tags:
        raise OSError(f"{name} is neither a folder, nor scenes:N, nor a single task of lmms-eval")
    task = get_task_dict([name], manager)[name]
    documents = task.eval_docs
    first_use: dict[str, tuple[int, int]] = {}
    # A benchmark asks many questions about one picture.
    for row in range(len(documents)):
        for place, picture in enumerate(task.doc_to_visual(documents[row])):
            first_use.setdefault(hashlib.sha256(picture.tobytes()).hexdigest()[:16], (row, place))
    uses = list(first_use.values())

    def opener(number: int) -> Image.Image:
        row, place = uses[number]
        return task.doc_to_visual(documents[row])[place]

    return Pictures([f"{name} {digest}" for digest in first_use], opener)
