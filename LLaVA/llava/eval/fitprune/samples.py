"""What a recipe is fitted on: pictures with a question each, opened one at a time."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates, image_mark
from llava.mm_utils import load_rgb, tokenizer_image_token

MINI = "mini"
CONVERSATION = "vicuna_v1"
"""The template that benchmarks use with LLaVA."""

FIRST_SEED = 700_000_000
"""Of the embedded world's pictures; far from those that the embedded model is trained and evaluated on."""

SEEDS_APART = 1_000_000

Question = tuple[str, str, Image.Image]
"""Name of a sample, what is asked, and the picture."""


@dataclass(frozen=True)
class Source:
    """Questions about one picture each.

    Attributes
    ----------
    name : str
        What ``--data`` said.
    digest : str
        Differs when the content does.
    seed : int
        Of the choice among them.
    count : int
    read : callable
        Opens one by its number.
    """

    name: str
    digest: str
    seed: int
    count: int
    read: Callable[[int], Question]


@dataclass(frozen=True)
class Sample:
    """A prompt with one picture.

    Attributes
    ----------
    name : str
        For messages.
    input_ids : Tensor (T,), int64
        The picture is -200.
    image : PIL.Image
    """

    name: str
    input_ids: torch.Tensor
    image: Image.Image

    @property
    def text(self) -> int:
        """Text tokens."""
        return len(self.input_ids) - 1

    @property
    def text_behind(self) -> int:
        """Text tokens behind the picture."""
        return self.text - int((self.input_ids == IMAGE_TOKEN_INDEX).nonzero())


class Samples:
    """A source's questions as a model is asked them, without an answer.

    Parameters
    ----------
    source : Source
    tokenizer
    config
        The model's.
    conversation : str
        A name of `llava.conversation.conv_templates`.
    """

    def __init__(self, source: Source, tokenizer, config, conversation: str = CONVERSATION):
        if conversation not in conv_templates:
            raise ValueError(f"unknown conversation mode {conversation!r}; allowed: {', '.join(conv_templates)}")
        self.source, self.conversation = source, conversation
        self._tokenizer, self._mark = tokenizer, image_mark(config)

    def __len__(self) -> int:
        return self.source.count

    def __getitem__(self, number: int) -> Sample:
        """Open one.

        Raises
        ------
        ValueError
            If nothing is asked, or the picture cannot be read; the message names the sample.
        """
        name, question, image = self.source.read(number)
        if not question.strip():
            raise ValueError(f"{name}: an image without text; FitPrune asks what the question attends to")
        turns = conv_templates[self.conversation].copy()
        turns.append_message(turns.roles[0], f"{self._mark}\n{question}")
        turns.append_message(turns.roles[1], None)
        ids = tokenizer_image_token(turns.get_prompt(), self._tokenizer, return_tensors="pt")
        return Sample(name, ids, load_rgb(image, name))

    def facts(self) -> dict[str, Any]:
        """What they are, JSON-serialisable."""
        source = self.source
        return {
            "name": source.name,
            "digest": source.digest,
            "samples": source.count,
            "seed": source.seed,
            "conversation": self.conversation,
        }


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
    from llava.eval.fitprune.tasks import open_tasks

    return open_tasks(data, count, seed)


def chosen(number: int, count: int, seed: int, *key: str) -> list[int]:
    """Up to ``count`` of ``number``, in random order, the same everywhere."""
    generator = random.Random("/".join([str(seed), *key]))
    return generator.sample(range(number), min(count, number))


def _mini(count: int, seed: int) -> Source:
    from llava.mini.questions import sample_questions
    from llava.mini.scenes import WORLD_VERSION, Dice, Scene, render, sample_scene

    def drawn(number: int) -> tuple[Scene, str]:
        scene = sample_scene(FIRST_SEED + SEEDS_APART * seed + number, "validation")
        # The first that the scene allows; of some thousand scenes one does not allow any of the first few tries.
        asked = next(filter(None, (sample_questions(scene, Dice("fitprune", seed, number), n) for n in (4, 64))))
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

    return Source(str(file), _digest(file.read_bytes()), seed, len(numbers), read)


def _pictures(entry: dict[str, Any]) -> int:
    image = entry.get("image")
    return 1 if isinstance(image, str) else len(image or ())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def digest_of(*parts: Any) -> str:
    """Twelve hexadecimal digits of JSON-serialisable values."""
    return _digest(json.dumps(parts, sort_keys=True, default=str).encode())
