"""The pictures that a pruner is trained on: a folder's, a benchmark's, or drawn ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.eval.benchmark_tasks import load_tasks
from llava.images import load_rgb

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
            return load_rgb(self.opener(number))
        except (OSError, ValueError) as error:
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
        numbers that its own training never sees; else a task or group of lmms-eval, with each picture of a task once.

    Raises
    ------
    OSError
        If there is no such folder or task, or its data cannot be had.
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
        found = _tasks(source)
    if len(found) == 0:
        kinds = f" ({', '.join(sorted(SUFFIXES))})" if Path(source).is_dir() else ""
        raise ValueError(f"{source} holds no picture{kinds}")
    return found


def _folder(folder: Path) -> Pictures:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return Pictures([file.relative_to(folder).as_posix() for file in files], lambda number: load_rgb(files[number]))


def _scenes(source: str) -> Pictures:
    from llava.mini.scenes import render, sample_scene

    text = source.removeprefix(SCENES)
    if not text.isdecimal():
        raise ValueError(f"{source}: the number of scenes must be a whole number")
    seeds = range(FIRST_SCENE, FIRST_SCENE + int(text))
    return Pictures([f"scene {seed}" for seed in seeds], lambda number: render(sample_scene(seeds[number], "train")))


def _tasks(source: str) -> Pictures:
    try:
        tasks = load_tasks(source)
    except ImportError as error:
        raise ImportError(f"{source} is no folder, and a task needs the package lmms-eval: {error}") from error
    except ValueError as error:
        raise OSError(f"{source} is neither a folder nor scenes:N, and {error}") from None
    first_use: dict[str, tuple[str, int, int]] = {}
    # A benchmark asks many questions about one picture.
    for name, task in tasks.items():
        for row in range(len(task.eval_docs)):
            for place, picture in enumerate(_shown(task, row)):
                digest = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
                first_use.setdefault(f"{name} {digest}", (name, row, place))
    uses = list(first_use.values())

    def opener(number: int) -> Image.Image:
        name, row, place = uses[number]
        return _shown(tasks[name], row)[place]

    return Pictures(list(first_use), opener)


def _shown(task: Any, row: int) -> list[Image.Image]:
    """The pictures of a task's document: some have none, and some have other media."""
    shown = task.doc_to_visual(task.eval_docs[row]) or []
    return [picture for picture in shown if isinstance(picture, Image.Image)]
