"""Training data in LLaVA's format: conversations about images, as tokens and labels.

A file is a JSON list of entries ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}``.
``image`` is a file name, a list of them, or absent; ``<image>`` in a human turn marks where an image goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates, image_mark
from llava.images import load_rgb, open_image
from llava.mm_utils import process_images, tokenizer_image_token

__all__ = ["TEMPLATES", "Collator", "ConversationDataset", "find_faults", "read_entries", "tokenize_conversation"]

# What `--template` may name: the conversation template, and how its training labels are made.
TEMPLATES = {"v1": "vicuna_v1", "plain": "plain"}
SPEAKERS = ("human", "gpt")
MOST_NAMED = 20
"""Faulty entries that a summary names."""


def read_entries(file: str | Path, *checks: Any) -> list[dict[str, Any]]:
    """The entries of a data file; an OSError or ValueError if it cannot be read, or is no JSON list of conversations.

    The message names the entries that cannot be used. ``checks`` are the further arguments of `find_faults`; without
    them, images and lengths are not looked at.
    """
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file} must hold a JSON list of at least one conversation")
    if faults := find_faults(entries, *checks):
        raise ValueError(_summary(file, entries, faults))
    return entries


def find_faults(
    entries: Sequence[Any],
    template: str | None = None,
    images: str | Path | None = None,
    tokenizer=None,
    max_length: int | None = None,
    mark: str = DEFAULT_IMAGE_TOKEN,
) -> dict[int, str]:
    """What is wrong with entries: number -> one sentence. Nothing is decoded and hardly anything tokenised.

    Parameters
    ----------
    entries : sequence
        As a data file holds them.
    template : str, optional
        What is wrong for one template alone, see `tokenize_conversation`.
    images : str or Path, optional
        The folder that image names are relative to: that each is there, and begins as an image does.
    tokenizer, max_length
        Given both, and a template: that an answer begins within ``max_length`` tokens.
    mark : str
        See `tokenize_conversation`.
    """
    faults: dict[int, str] = {}
    seen: set[str] = set()
    for number, entry in enumerate(entries):
        try:
            _check_entry(entry)
            if template == "plain":
                _check_plain(entry["conversations"])
            if images is not None:
                for name in set(image_names(entry)) - seen:
                    open_image(Path(images) / name).close()
                    seen.add(name)
            if tokenizer is not None and max_length is not None and template is not None:
                _check_length(entry["conversations"], tokenizer, template, max_length, mark)
        except (OSError, ValueError) as error:
            faults[number] = str(error)
    return faults


def _summary(file: str | Path, entries: Sequence[Any], faults: Mapping[int, str]) -> str:
    """How many entries cannot be used, and what is wrong with the first of them, a line each."""
    lines = [f"{len(faults)} of {len(entries)} entries of {file} cannot be used:"]
    lines += [f"  {entry_name(entries, number)}: {fault}" for number, fault in list(faults.items())[:MOST_NAMED]]
    if len(faults) > MOST_NAMED:
        lines.append(f"  and {len(faults) - MOST_NAMED} more")
    return "\n".join(lines)


def entry_name(entries: Sequence[Any], number: int) -> str:
    """What messages call an entry: its number in the file, from 0, and its id if it has one."""
    entry = entries[number]
    known = f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""
    return f"entry {number}{known}"


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
    names = image_names(entry)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"'image' must be a file name or a list of them, got {entry['image']!r}")
    marks = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if marks != len(names):
        raise ValueError(f"{marks} {DEFAULT_IMAGE_TOKEN} marks, but {len(names)} images")
    for place, turn in list(enumerate(turns))[1::2]:
        if DEFAULT_IMAGE_TOKEN in turn["value"]:
            raise ValueError(f"the answer in turn {place} contains {DEFAULT_IMAGE_TOKEN}")
        if not turn["value"].strip():
            raise ValueError(f"the answer in turn {place} is empty")


def _check_plain(turns: Sequence[dict[str, str]]) -> None:
    if len(turns) != 2 or turns[0]["value"].count(DEFAULT_IMAGE_TOKEN) != 1:
        texts = [turn["value"] for turn in turns]
        raise ValueError(f"the plain template takes one image and its caption, got {texts!r}")


def _check_length(turns: Sequence[dict[str, str]], tokenizer, template: str, max_length: int, mark: str) -> None:
    asked, _ = next(iter(_spans(turns, template, mark)))
    # A token has a byte at least, and each stretch of text a few of its own: few conversations have to be tokenised.
    if len(asked.encode()) + 4 * (1 + asked.count(DEFAULT_IMAGE_TOKEN)) < max_length:
        return
    _, labels = tokenize_conversation(turns, tokenizer, template, mark)
    if all(label == IGNORE_INDEX for label in labels[:max_length]):
        first = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        raise ValueError(f"its first answer begins at token {first}, beyond the {max_length} that are kept")


def image_names(entry: dict[str, Any]) -> list[str]:
    """The images of an entry."""
    image = entry.get("image")
    return image if isinstance(image, list) else [] if image is None else [image]


def tokenize_conversation(
    turns: Sequence[dict[str, str]], tokenizer, template: str, mark: str = DEFAULT_IMAGE_TOKEN
) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and labels of the same length that are -100 everywhere but in the answers.

    ``<image>`` is -200. Answers are labelled with the end-of-text token (plain: line end).

    Parameters
    ----------
    turns : sequence of {"from", "value"}
        Human and gpt in turn.
    tokenizer
    template : str
        "v1": Vicuna's conversation, as LLaVA-1.5 is asked; a turn's ``<image>`` is moved in front of its text.
        "plain": only the image and its caption, for training a projector. A ValueError for anything else, or a plain
        conversation that is not one image and one caption.
    mark : str
        What stands for an image in front of a turn of "v1", as `llava.conversation.image_mark` has it for a model.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}; got {template!r}")
    spans = list(_spans(turns, template, mark))
    input_ids = tokenizer_image_token(spans[-1][1], tokenizer)
    labels = [IGNORE_INDEX] * len(input_ids)
    for asked, answered in spans:
        start = _common_length(tokenizer_image_token(asked, tokenizer), input_ids)
        end = _common_length(tokenizer_image_token(answered, tokenizer), input_ids)
        labels[start:end] = input_ids[start:end]
    return input_ids, labels


def _spans(turns: Sequence[dict[str, str]], template: str, mark: str) -> Iterator[tuple[str, str]]:
    """For every answer the whole text before it, and the same with the answer."""
    texts = [turn["value"] for turn in turns]
    if template == "plain":
        _check_plain(turns)
        yield DEFAULT_IMAGE_TOKEN, DEFAULT_IMAGE_TOKEN + texts[1] + conv_templates["plain"].sep
        return
    conversation = conv_templates[TEMPLATES[template]].copy()
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        conversation.append_message(conversation.roles[0], _image_first(question, mark))
        conversation.append_message(conversation.roles[1], None)
        asked = conversation.get_prompt()
        conversation.messages[-1][-1] = answer
        yield asked, conversation.get_prompt()


def _image_first(text: str, mark: str) -> str:
    images = text.count(DEFAULT_IMAGE_TOKEN)
    if not images:
        return text
    words = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return " ".join([mark] * images) + "\n" + words


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
        The model's configuration: how images are prepared and marked.
    template : str
        See `tokenize_conversation`.
    max_length : int, optional
        Cut off tokens after this many, and with a mark its image.
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
        self.mark = image_mark(config)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """``input_ids``, ``labels`` (T,); ``images``, a list of float32 tensors; ``sizes``, their (width, height).

        A ValueError names an entry whose image turns out to be damaged.
        """
        try:
            return self._example(self.entries[number])
        except (OSError, ValueError) as error:
            raise ValueError(f"{entry_name(self.entries, number)}: {error}") from error

    def _example(self, entry: dict[str, Any]) -> dict[str, Any]:
        input_ids, labels = tokenize_conversation(entry["conversations"], self.tokenizer, self.template, self.mark)
        input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        # An image whose mark was cut off would be taken for the next row's.
        images = [load_rgb(self.images / name) for name in image_names(entry)[: input_ids.count(IMAGE_TOKEN_INDEX)]]
        return {
            "input_ids": torch.tensor(input_ids),
            "labels": torch.tensor(labels),
            "images": list(process_images(images, self.image_processor, self.config)) if images else [],
            "sizes": [image.size for image in images],
        }


class Collator:
    """Makes a batch: texts padded on the right, images in the order of their marks.

    A blank image of side ``image_size`` stands in for a conversation without one: every row takes an image.
    """

    def __init__(self, pad_token_id: int, image_size: int):
        self.pad_token_id, self.image_size = pad_token_id, image_size

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The model's arguments: ``input_ids``, ``labels``, ``attention_mask`` (B, T), ``images``, ``image_sizes``.

        A ValueError if an example has another number of images than of marks: the rows after it would see its images.
        """
        for place, example in enumerate(examples):
            marks, count = int((example["input_ids"] == IMAGE_TOKEN_INDEX).sum()), len(example["images"])
            if marks != count:
                raise ValueError(f"example {place} of the batch has {marks} image marks, but {count} images")
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
            "use_cache": False,
        }


def _padded(rows: list[torch.Tensor], filler) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
