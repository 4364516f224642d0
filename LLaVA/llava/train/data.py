"""Training data in LLaVA's format: conversations about images, as tokens and labels.

A file is a JSON list of entries ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}``.
``image`` is a file name, a list of them, or absent; ``<image>`` in a human turn says where an image goes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import load_rgb, process_images, tokenizer_image_token

__all__ = ["TEMPLATES", "Collator", "ConversationDataset", "read_entries", "tokenize_conversation"]

# What `--template` may name: the conversation template, and how its training labels are made.
TEMPLATES = {"v1": "vicuna_v1", "plain": "plain"}
SPEAKERS = ("human", "gpt")


def read_entries(file: str | Path) -> list[dict[str, Any]]:
    """The entries of a data file, checked.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is not a JSON list of conversations; the message names the entry.
    """
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file} must hold a JSON list of at least one conversation")
    for number, entry in enumerate(entries):
        try:
            _check_entry(entry)
        except ValueError as error:
            name = entry.get("id", number) if isinstance(entry, dict) else number
            raise ValueError(f"{file}, entry {number} (id {name}): {error}") from error
    return entries


def _check_entry(entry: Any) -> None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        raise ValueError("an entry is an object with at least two turns under 'conversations'")
    for place, turn in enumerate(turns):
        speaker = SPEAKERS[place % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {place} must be {{'from': '{speaker}', 'value': text}}, got {turn!r}")
    if len(turns) % 2:
        raise ValueError("the last turn must be an answer ('gpt')")
    marks = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    images = len(_image_names(entry))
    if marks != images:
        raise ValueError(f"{marks} {DEFAULT_IMAGE_TOKEN} marks, but {images} images")
    if any(DEFAULT_IMAGE_TOKEN in turn["value"] for turn in turns[1::2]):
        raise ValueError(f"an answer contains {DEFAULT_IMAGE_TOKEN}")


def _image_names(entry: dict[str, Any]) -> list[str]:
    image = entry.get("image")
    if image is None:
        return []
    return [image] if isinstance(image, str) else list(image)


def tokenize_conversation(turns: Sequence[dict[str, str]], tokenizer, template: str) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and labels that are -100 everywhere but in the answers.

    Parameters
    ----------
    turns : sequence of {"from", "value"}
        Human and gpt in turn.
    tokenizer
    template : str
        "v1": Vicuna's conversation, as LLaVA-1.5 is asked; a turn's ``<image>`` is moved in front of its text.
        "plain": only the image and its caption, for training a projector.

    Returns
    -------
    input_ids, labels : list of int
        The same length; ``<image>`` is -200. Answers are labelled with the end-of-text token (plain: line end).

    Raises
    ------
    ValueError
        For an unknown template, or a plain conversation that is not one image and one caption.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}; got {template!r}")
    texts = [turn["value"] for turn in turns]
    if template == "plain":
        if len(texts) != 2 or texts[0].count(DEFAULT_IMAGE_TOKEN) != 1:
            raise ValueError(f"the plain template takes one image and its caption, got {texts!r}")
        spans = [(DEFAULT_IMAGE_TOKEN, DEFAULT_IMAGE_TOKEN + texts[1] + conv_templates["plain"].sep)]
    else:
        spans = _v1_spans([_image_first(text) if place % 2 == 0 else text for place, text in enumerate(texts)])
    input_ids = tokenizer_image_token(spans[-1][1], tokenizer)
    labels = [IGNORE_INDEX] * len(input_ids)
    for asked, answered in spans:
        start = _common_length(tokenizer_image_token(asked, tokenizer), input_ids)
        end = _common_length(tokenizer_image_token(answered, tokenizer), input_ids)
        labels[start:end] = input_ids[start:end]
    return input_ids, labels


def _v1_spans(texts: list[str]) -> list[tuple[str, str]]:
    """For every answer the whole text in front of it, and the same with the answer."""
    conversation = conv_templates[TEMPLATES["v1"]].copy()
    spans = []
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        asked = conversation.get_prompt()
        conversation.messages[-1][-1] = answer
        spans.append((asked, conversation.get_prompt()))
    return spans


def _image_first(text: str) -> str:
    marks = text.count(DEFAULT_IMAGE_TOKEN)
    if not marks:
        return text
    words = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return " ".join([DEFAULT_IMAGE_TOKEN] * marks) + "\n" + words


def _common_length(a: list[int], b: list[int]) -> int:
    """How many tokens a and b begin with alike: a text's last token may change when more text follows."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class ConversationDataset(Dataset):
    """Conversations with their images, tokenised when they are asked for.

    Parameters
    ----------
    entries : list of dict
        See `read_entries`.
    images : str or Path
        The folder that image names are relative to.
    tokenizer, image_processor
    config
        The model's configuration: how images are prepared.
    template : str
        See `tokenize_conversation`.
    max_length : int, optional
        Cut off tokens behind this many.
    """

    def __init__(
        self,
        entries: list[dict[str, Any]],
        images: str | Path,
        tokenizer,
        image_processor,
        config,
        template: str = "v1",
        max_length: int | None = None,
    ):
        self.entries, self.images = entries, Path(images)
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config
        self.template, self.max_length = template, max_length

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """``input_ids``, ``labels`` (T,); ``images``, a list of float32 tensors; ``sizes``, their (width, height)."""
        entry = self.entries[number]
        input_ids, labels = tokenize_conversation(entry["conversations"], self.tokenizer, self.template)
        pictures = [load_rgb(self.images / name) for name in _image_names(entry)]
        pixels = list(process_images(pictures, self.image_processor, self.config)) if pictures else []
        return {
            "input_ids": torch.tensor(input_ids[: self.max_length]),
            "labels": torch.tensor(labels[: self.max_length]),
            "images": pixels,
            "sizes": [picture.size for picture in pictures],
        }


class Collator:
    """Makes a batch: texts padded on the right, images in the order of their marks.

    Parameters
    ----------
    pad_token_id : int
    image_size : int
        Side of the blank image that stands in for a conversation without one: every row takes an image.
    """

    def __init__(self, pad_token_id: int, image_size: int):
        self.pad_token_id, self.image_size = pad_token_id, image_size

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """``input_ids``, ``labels``, ``attention_mask`` (B, T); ``images``, ``image_sizes`` as the model takes them."""
        blank = torch.zeros(3, self.image_size, self.image_size)
        ids, labels = [e["input_ids"] for e in examples], [e["labels"] for e in examples]
        images = [image for e in examples for image in (e["images"] or [blank])]
        sizes = [size for e in examples for size in (e["sizes"] or [(self.image_size, self.image_size)])]
        alike = all(image.shape == images[0].shape for image in images)
        return {
            "input_ids": _padded(ids, self.pad_token_id),
            "labels": _padded(labels, IGNORE_INDEX),
            "attention_mask": _padded([torch.ones_like(row, dtype=torch.bool) for row in ids], False),
            "images": torch.stack(images) if alike else images,
            "image_sizes": sizes,
        }


def _padded(rows: list[torch.Tensor], filler) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
