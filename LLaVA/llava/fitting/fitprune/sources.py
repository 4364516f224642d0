"""Where samples come from: the embedded world, a JSON file in LLaVA's format, or lmms-eval's benchmark tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.fitting.fitprune.samples import Question, Source, chosen, digest_of, digest_of_bytes
from llava.fitting.fitprune.tasks import open_tasks
from llava.mm_utils import load_rgb

MINI = "mini"

FIRST_SEED = 700_000_000
"""Of the embedded world's pictures; far from those that the embedded model is trained and evaluated on."""

SEEDS_APART = 1_000_000


def open_source(data: str, count: int, seed: int = 0, image_folder: str | Path | None = None) -> Source:
    """Choose samples.

    Parameters
    ----------
    data : str
        "mini": pictures and questions of the embedded suite's kind, none of which it is trained or scored on. A JSON
        file in LLaVA's format: the first question of conversations about one picture. Anything else: a benchmark task
        of lmms-eval, or a group of tasks (otprune_mini: the embedded suite itself), which share the samples.
    count : int
        How many; fewer where there are fewer.
    seed : int
        Of the choice among them.
    image_folder : path, optional
        What a JSON file's picture names are relative to; by default the file's folder.

    Raises
    ------
    ValueError
        If no sample is asked for, or there is none.
    OSError
        If a file cannot be read.
    """
    if count < 1:
        raise ValueError(f"a recipe needs at least one sample to be fitted on, not {count}")
    if data == MINI:
        return _mini(count, seed)
    if data.endswith(".json") or Path(data).is_file():
        return _conversations(Path(data), count, seed, image_folder)
    return open_tasks(data, count, seed)


def _mini(count: int, seed: int) -> Source:
    from llava.mini.questions import sample_questions
    from llava.mini.scenes import Scene, render, sample_scene
    from llava.mini.seeded_random import WORLD_VERSION, SeededRandom

    def drawn(number: int) -> tuple[Scene, str]:
        scene = sample_scene(FIRST_SEED + SEEDS_APART * seed + number, "validation")
        # The first that the scene allows; of some thousand scenes one does not allow any of the first few tries.
        asked = next(
            filter(None, (sample_questions(scene, SeededRandom("fitprune", seed, number), n) for n in (4, 64)))
        )
        return scene, asked[0].prompt

    def read(number: int) -> Question:
        scene, asked = drawn(number)
        return f"picture {number} of the embedded world", asked, render(scene)

    digest = digest_of(WORLD_VERSION, [drawn(number)[1] for number in range(count)])
    return Source(MINI, digest, seed, count, read)


def _conversations(file: Path, count: int, seed: int, image_folder: str | Path | None) -> Source:
    from llava.train.data import read_entries

    entries = [entry for entry in read_entries(file) if _pictures(entry) == 1]
    if not entries:
        raise ValueError(f"{file} holds no conversation about exactly one picture")
    folder = file.parent if image_folder is None else Path(image_folder)
    numbers = chosen(len(entries), count, seed)

    def read(number: int) -> Question:
        entry = entries[numbers[number]]
        (picture,) = [entry["image"]] if isinstance(entry["image"], str) else entry["image"]
        name = f"{file}, conversation {entry.get('id', numbers[number])}"
        question = entry["conversations"][0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        try:
            image = load_rgb(folder / picture)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
        return name, question, image

    return Source(str(file), digest_of_bytes(file.read_bytes()), seed, len(numbers), read)


def _pictures(entry: dict[str, Any]) -> int:
    image = entry.get("image")
    return 1 if isinstance(image, str) else len(image or ())
