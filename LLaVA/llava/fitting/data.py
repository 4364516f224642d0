"""What something is fitted or trained on: images, with a question each where one is needed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image

from llava.benchmark_tasks import load_tasks
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.images import load_rgb

MINI, PAGES, SCENES = "mini", "pages", "scenes:"
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

FIRST_SCENE, FIRST_QUESTION = 400_000_000, 700_000_000
"""Seeds of the embedded world's images, far from those that the embedded model is trained and evaluated on."""

SEEDS_APART = 1_000_000

Opener = Callable[[int], tuple[Image.Image, str]]


@dataclass(frozen=True)
class Source:
    """Images by number, in an order that is the same every time, opened one at a time.

    Attributes
    ----------
    name : str
        As the command line named it.
    names : sequence of str
        Of every image, for messages.
    opener : callable
        Number -> an image of any mode, and what is asked about it, or "".
    digest, seed
        The former differs when the content does; the latter is that of the choice.
    """

    name: str
    names: Sequence[str]
    opener: Opener
    digest: str = ""
    seed: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def open(self, number: int) -> tuple[Image.Image, str]:
        """An image in RGB, and its question; an OSError names the image if it cannot be read."""
        try:
            image, question = self.opener(number)
            return load_rgb(image), question
        except (OSError, ValueError) as error:
            raise OSError(f"Cannot read the image {self.names[number]}: {error}") from error

    def first(self, count: int | None) -> Source:
        """The first ``count``, or all of them."""
        return self if count is None else Source(self.name, self.names[:count], self.opener, self.digest)


def find_images(source: str) -> Source:
    """Images alone; an OSError or ValueError if there are none, or they cannot be had.

    ``source`` is a folder, searched with all that is in it; "scenes:N" for N images of the embedded world; else a task
    or group of lmms-eval, with each image of a task once.
    """
    if source.startswith(SCENES):
        found = _scenes(source)
    elif Path(source).is_dir():
        found = _folder(Path(source))
    elif "/" in source or source.startswith("."):
        raise OSError(f"There is no folder {source}")
    else:
        found = _task_images(source)
    if not len(found):
        kinds = f" ({', '.join(sorted(SUFFIXES))})" if Path(source).is_dir() else ""
        raise ValueError(f"{source} holds no image{kinds}")
    return found


def find_questions(source: str, count: int, seed: int = 0, image_folder: str | Path | None = None) -> Source:
    """Images with a question each; fewer than ``count`` where there are fewer.

    Parameters
    ----------
    source : str
        "mini": images and questions of the embedded suite's kind, none of which it is trained or scored on; "pages":
        the same to read. A JSON file in LLaVA's format: the first question of conversations about one image. Else a
        task or group of lmms-eval (otprune_mini: the embedded suite itself), whose tasks share the samples: questions
        about one image.
    count, seed : int
        How many, and the seed of the choice.
    image_folder : path, optional
        What a JSON file's image names are relative to; by default the file's folder.

    Raises
    ------
    OSError, ValueError
        If a file or task cannot be read, no sample is asked for, or there is none.
    """
    if count < 1:
        raise ValueError(f"at least one sample is needed to learn from, not {count}")
    if source in EMBEDDED_WORLD:
        return _embedded(source, count, seed)
    if source.endswith(".json") or Path(source).is_file():
        return _conversations(Path(source), count, seed, image_folder)
    return _task_questions(source, count, seed)


def digest_of(*parts: Any) -> str:
    """Twelve hexadecimal digits of JSON-serialisable values."""
    return digest_of_bytes(json.dumps(parts, sort_keys=True, default=str).encode())


def digest_of_bytes(content: bytes) -> str:
    """Twelve hexadecimal digits of a file's content."""
    return hashlib.sha256(content).hexdigest()[:12]


def _folder(folder: Path) -> Source:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    names = [file.relative_to(folder).as_posix() for file in files]
    return Source(str(folder), names, lambda number: (load_rgb(files[number]), ""))


def _scenes(source: str) -> Source:
    from llava.mini.scenes import render, sample_scene

    text = source.removeprefix(SCENES)
    if not text.isdecimal():
        raise ValueError(f"{source}: the number of scenes must be a whole number")
    seeds = range(FIRST_SCENE, FIRST_SCENE + int(text))
    names = [f"scene {seed}" for seed in seeds]
    return Source(source, names, lambda number: (render(sample_scene(seeds[number], "train")), ""))


def _mini(number: int, seed: int) -> tuple[Callable[[], Image.Image], str]:
    from llava.mini.questions import sample_questions
    from llava.mini.scenes import render, sample_scene
    from llava.mini.seeded_random import SeededRandom

    scene = sample_scene(FIRST_QUESTION + SEEDS_APART * seed + number, "validation")
    # The first that the scene allows; of some thousand scenes one does not allow any of the first few tries.
    tries = (sample_questions(scene, SeededRandom("fitprune", seed, number), n) for n in (4, 64))
    return partial(render, scene), next(filter(None, tries))[0].prompt


def _page(number: int, seed: int) -> tuple[Callable[[], Image.Image], str]:
    from llava.mini.pages import PAGES as KINDS
    from llava.mini.pages import render_page
    from llava.mini.questions import sample_page_questions
    from llava.mini.seeded_random import SeededRandom

    rng = SeededRandom("fitted pages", seed, number)
    kind = rng.choice(tuple(KINDS))
    page = KINDS[kind](rng)
    return partial(render_page, page), sample_page_questions(kind, page, rng, 1)[0].prompt


def _embedded(source: str, count: int, seed: int) -> Source:
    from llava.mini.seeded_random import WORLD_VERSION

    draw = EMBEDDED_WORLD[source]

    def opener(number: int) -> tuple[Image.Image, str]:
        render, asked = draw(number, seed)
        return render(), asked

    digest = digest_of(WORLD_VERSION, [draw(number, seed)[1] for number in range(count)])
    return Source(source, [f"{number} of the embedded world" for number in range(count)], opener, digest, seed)


EMBEDDED_WORLD = {MINI: _mini, PAGES: _page}
"""Name of a source -> function of an image's number and a seed that gives how to draw the image, and a question."""


def _conversations(file: Path, count: int, seed: int, image_folder: str | Path | None) -> Source:
    from llava.train.data import image_names, read_entries

    entries = [entry for entry in read_entries(file) if len(image_names(entry)) == 1]
    if not entries:
        raise ValueError(f"{file} holds no conversation about exactly one image")
    folder = file.parent if image_folder is None else Path(image_folder)
    chosen = _chosen(len(entries), count, seed)

    def opener(number: int) -> tuple[Image.Image, str]:
        entry = entries[chosen[number]]
        question = entry["conversations"][0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        return load_rgb(folder / image_names(entry)[0]), question

    names = [f"of {file}, conversation {entries[number].get('id', number)}" for number in chosen]
    return Source(str(file), names, opener, digest_of_bytes(file.read_bytes()), seed)


def _task_questions(name: str, count: int, seed: int) -> Source:
    tasks = _tasks(name)

    def question(task: str, row: int) -> str:
        tasked = tasks[task]
        return tasked.doc_to_text(tasked.eval_docs_no_media[row]).replace(DEFAULT_IMAGE_TOKEN, "").strip()

    def rows() -> Iterator[tuple[str, int]]:
        """Documents with one image each, the tasks in turn."""
        left = {
            task: iter(_chosen(len(docs.eval_docs), len(docs.eval_docs), seed, task)) for task, docs in tasks.items()
        }
        for task in cycle(tasks):
            if not left:
                return
            row = next((row for row in left.get(task, ()) if len(_shown(tasks[task], row)) == 1), None)
            if row is None:
                left.pop(task, None)
            else:
                yield task, row

    found = list(islice(rows(), count))
    if not found:
        raise ValueError(f"{name}: the task has no question about exactly one image")

    def opener(number: int) -> tuple[Image.Image, str]:
        task, row = found[number]
        return _shown(tasks[task], row)[0], question(task, row)

    digest = digest_of(found, [question(*place) for place in found])
    return Source(name, [f"of {task}, document {row}" for task, row in found], opener, digest, seed)


def _task_images(name: str) -> Source:
    tasks = _tasks(name)
    first_use: dict[str, tuple[str, int, int]] = {}
    # A benchmark asks many questions about one image.
    for task, docs in tasks.items():
        for row in range(len(docs.eval_docs)):
            for place, image in enumerate(_shown(docs, row)):
                digest = hashlib.sha256(image.tobytes()).hexdigest()[:16]
                first_use.setdefault(f"{task} {digest}", (task, row, place))
    uses = list(first_use.values())

    def opener(number: int) -> tuple[Image.Image, str]:
        task, row, place = uses[number]
        return _shown(tasks[task], row)[place], ""

    return Source(name, list(first_use), opener)


def _tasks(name: str) -> dict[str, Any]:
    try:
        return load_tasks(name)
    except ImportError as error:
        raise ValueError(
            f"{name} is no file or folder, and a benchmark task requires the package lmms-eval: {error}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{name} is no file or folder, and {error}") from None


def _shown(task: Any, row: int) -> list[Image.Image]:
    """The images of a task's document: some have none, and some have other media."""
    shown = task.doc_to_visual(task.eval_docs[row]) or []
    return [image for image in shown if isinstance(image, Image.Image)]


def _chosen(number: int, count: int, seed: int, *key: str) -> list[int]:
    """Up to ``count`` of ``number``, in random order, the same everywhere."""
    return random.Random("/".join([str(seed), *key])).sample(range(number), min(count, number))
