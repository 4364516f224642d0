"""Turns a task's text and images into model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token


@dataclass(frozen=True)
class Row:
    """One prompt of a batch.

    Attributes
    ----------
    input_ids : Tensor (T,), int64
        An image is IMAGE_TOKEN_INDEX.
    image_sizes : tuple of (width, height)
        Of as many images as there are marks for them.
    """

    input_ids: torch.Tensor
    image_sizes: tuple[tuple[int, int], ...]


def conversation(
    template: str, context: str, images: int, answer: str | None = None, mark: str = DEFAULT_IMAGE_TOKEN
) -> str:
    """The prompt of a task's text, up to the answer or with it; image marks are put in front if it has none.

    Parameters
    ----------
    template : str
        A name of `llava.conversation.conv_templates`.
    context : str
    images : int
        Images that go with it.
    answer : str, optional
    mark : str
        The checkpoint's mark for an image, see `llava.conversation.image_mark`.
    """
    if images and DEFAULT_IMAGE_TOKEN not in context:
        context = " ".join([DEFAULT_IMAGE_TOKEN] * images) + "\n" + context
    context = context.replace(DEFAULT_IMAGE_TOKEN, mark)
    turns = conv_templates[template].copy()
    turns.append_message(turns.roles[0], context)
    turns.append_message(turns.roles[1], answer)
    return turns.get_prompt()


def make_row(tokenizer: PreTrainedTokenizerBase, prompt: str, images: Sequence[Image.Image]) -> Row:
    """Tokenise a prompt that takes as many of the images as it has marks.

    Raises
    ------
    ValueError
        If it has more marks than there are images.
    """
    marks = prompt.count(DEFAULT_IMAGE_TOKEN)
    if marks > len(images):
        raise ValueError(f"the prompt has {marks} <image> marks, but there are {len(images)} images")
    # An image without a mark would be assigned to the next row.
    sizes = tuple(image.size for image in images[:marks])
    return Row(tokenizer_image_token(prompt, tokenizer, return_tensors="pt"), sizes)


def pad_left(rows: Sequence[Row], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (B, T), padded on the left for generation."""
    ids = [row.input_ids for row in rows]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(ids, padding_value=pad_token_id), pad([torch.ones_like(row, dtype=torch.bool) for row in ids])


def shared_beginning(rows: Sequence[Row]) -> Row | None:
    """Prompts up to their last image, if that is the same text and as many images of the same sizes in all of them.

    None as well where their lengths differ, or nothing follows.
    """
    marks = (rows[0].input_ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    if not marks:
        return None
    begin = Row(rows[0].input_ids[: marks[-1] + 1], rows[0].image_sizes)
    n, whole = len(begin.input_ids), len(rows[0].input_ids)
    alike = all(
        len(row.input_ids) == whole > n
        and row.image_sizes == begin.image_sizes
        and torch.equal(row.input_ids[:n], begin.input_ids)
        for row in rows
    )
    return begin if alike else None


def text_tokens(row: Row) -> int:
    """Number of text tokens in the prompt."""
    return int((row.input_ids != IMAGE_TOKEN_INDEX).sum())
