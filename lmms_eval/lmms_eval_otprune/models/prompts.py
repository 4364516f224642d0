"""From a task's text and images to what the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
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
    images : tuple of PIL images
        As many as there are marks for them.
    """

    input_ids: torch.Tensor
    images: tuple[Image.Image, ...]


def conversation(
    template: str, context: str, images: int, answer: str | None = None, mark: str = DEFAULT_IMAGE_TOKEN
) -> str:
    """A task's text in a conversation, up to the answer or with it; image marks are put in front if it has none.

    Parameters
    ----------
    template : str
        A name of `llava.conversation.conv_templates`.
    context : str
    images : int
        Images that go with it.
    answer : str, optional
    mark : str
        What the checkpoint knows an image by, see `llava.conversation.image_mark`.
    """
    if images and DEFAULT_IMAGE_TOKEN not in context:
        context = " ".join([DEFAULT_IMAGE_TOKEN] * images) + "\n" + context
    context = context.replace(DEFAULT_IMAGE_TOKEN, mark)
    turns = conv_templates[template].copy()
    turns.append_message(turns.roles[0], context)
    turns.append_message(turns.roles[1], answer)
    return turns.get_prompt()


def make_row(tokenizer: PreTrainedTokenizerBase, prompt: str, images: Sequence[Image.Image]) -> Row:
    """Tokenise a prompt and keep the images that it has marks for.

    Raises
    ------
    ValueError
        If it has more marks than there are images.
    """
    marks = prompt.count(DEFAULT_IMAGE_TOKEN)
    if marks > len(images):
        raise ValueError(f"the prompt has {marks} <image> marks, but there are {len(images)} images")
    # An image without a mark would be taken for the next row's.
    return Row(tokenizer_image_token(prompt, tokenizer, return_tensors="pt"), tuple(images[:marks]))


def pad_left(rows: Sequence[Row], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (B, T); the padding stands in front, where generation does not continue it."""
    longest = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        input_ids[index, longest - len(row.input_ids) :] = row.input_ids
        mask[index, longest - len(row.input_ids) :] = True
    return input_ids, mask


def text_tokens(row: Row) -> int:
    """Tokens of the prompt that are no images."""
    return int((row.input_ids != IMAGE_TOKEN_INDEX).sum())
