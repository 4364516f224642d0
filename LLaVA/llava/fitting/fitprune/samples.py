"""What a recipe is fitted on: pictures with a question each, opened one at a time."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import benchmark_conv_mode, check_conv_mode, conv_templates, image_mark
from llava.mm_utils import get_model_name_from_path, load_rgb, tokenizer_image_token

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
    conversation : str, optional
        A name of `llava.conversation.conv_templates`; default: the one that benchmarks ask this model with.
    """

    def __init__(self, source: Source, tokenizer, config, conversation: str | None = None):
        check_conv_mode(conversation)
        name = get_model_name_from_path(getattr(config, "name_or_path", ""))
        self.source, self.conversation = source, conversation or benchmark_conv_mode(name, config, tokenizer)
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


def chosen(number: int, count: int, seed: int, *key: str) -> list[int]:
    """Up to ``count`` of ``number``, in random order, the same everywhere."""
    generator = random.Random("/".join([str(seed), *key]))
    return generator.sample(range(number), min(count, number))


def digest_of_bytes(content: bytes) -> str:
    """Twelve hexadecimal digits of a file's content."""
    return hashlib.sha256(content).hexdigest()[:12]


def digest_of(*parts: Any) -> str:
    """Twelve hexadecimal digits of JSON-serialisable values."""
    return digest_of_bytes(json.dumps(parts, sort_keys=True, default=str).encode())
