"""Where text and visual tokens stand in the prompts that a language model reads.

A batch is laid out as integers first, on the host, which has to know every length: what each position holds, which
image it belongs to, what is to be predicted and where it would stand if nothing had been dropped. The embeddings are
then written into their places on the device, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.pruning.rows import TEXT
from llava.pruning.tokens import ImageTokens, KeptTokens


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts on the host, every image mark replaced by its image's tokens, padded on one side.

    Attributes
    ----------
    ids : Tensor (B, T), int64
        Text, and `IMAGE_TOKEN_INDEX` at visual tokens and padding.
    labels : Tensor (B, T), int64
        What is to be predicted.
    image_id : Tensor (B, T), int64
        The image that each position belongs to, counted over the batch; `TEXT` elsewhere.
    positions : Tensor (B, T), int64
        Where text would stand if nothing had been dropped, and where a visual token's image would begin.
    mask : Tensor (B, T), bool
        False at padding.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    image_id: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


def find_marks(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None, images: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[list[int]]]:
    """Each row's ids and labels on the host, without padding, and which of so many images stand in it.

    Raises what `assign_images` does.
    """
    ids = input_ids.cpu()  # one look at a batch, instead of several at each row
    valid = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
    wanted = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels.cpu()
    rows = [(row[own], goal[own]) for row, goal, own in zip(ids, wanted, valid, strict=True)]
    return rows, assign_images([int((row == IMAGE_TOKEN_INDEX).sum()) for row, _ in rows], images)


def assign_images(marks_of_rows: Sequence[int], available: int) -> list[list[int]]:
    """Which images stand in each row: rows take them in order, a row without a mark passes over one.

    Images that a single prompt has no mark for are ignored, as in the original LLaVA. Of several prompts they are
    refused with a ValueError: nothing says whose they are, and a row that is short of a mark would shift the images of
    all later rows. An IndexError if the rows take more images than there are.
    """
    rows, taken = [], 0
    for marks in marks_of_rows:
        rows.append(list(range(taken, taken + marks)))
        taken += max(1, marks)
    if taken > available:
        raise IndexError(
            f"The prompts take {taken} images ({list(marks_of_rows)} image marks per row, and one for a row without), "
            f"but only {available} came"
        )
    if taken < available and len(rows) > 1:
        raise ValueError(
            f"{available} images came, but the prompts take {taken} ({list(marks_of_rows)} image marks per row, and "
            "one for a row without): which of them belong to which row is not known"
        )
    return rows


def question_after_image(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The text (T,) after a row's first image mark, without what is to be predicted, which is no part of a question."""
    after = (ids == IMAGE_TOKEN_INDEX).cumsum(0) > 0
    return ids[after & (ids != IMAGE_TOKEN_INDEX) & (labels == IGNORE_INDEX)]


def build_prompts(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    images: Sequence[ImageTokens],
    kept: Sequence[KeptTokens],
    config: Any,
) -> Prompts:
    """Put each image's kept tokens in the place of its mark.

    Parameters
    ----------
    rows : sequence of (ids (T,), labels (T,))
        See `find_marks`.
    images, kept
        All tokens of each image, in the order of the marks, and what is left of them.
    config
        ``tokenizer_model_max_length``, where prompts are cut off, and ``tokenizer_padding_side``.
    """
    longest = getattr(config, "tokenizer_model_max_length", None)
    pad_left = getattr(config, "tokenizer_padding_side", "right") == "left"
    totals = [len(image) for image in images]
    counts, columns, first = [len(image.features) for image in kept], [], 0
    for ids, labels in rows:
        marks = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        numbers = range(first, first + len(marks))
        columns.append([values[:longest] for values in _build_prompt(ids, labels, marks, numbers, totals, counts)])
        first += len(marks)
    every_ids, every_labels, image_id, positions = zip(*columns, strict=True)
    return Prompts(
        ids=_pad(every_ids, IMAGE_TOKEN_INDEX, pad_left),
        labels=_pad(every_labels, IGNORE_INDEX, pad_left),
        image_id=_pad(image_id, TEXT, pad_left),
        positions=_pad(positions, 0, pad_left),
        mask=_pad([torch.ones_like(row, dtype=torch.bool) for row in every_ids], False, pad_left),
    )


def _build_prompt(
    ids: torch.Tensor,
    labels: torch.Tensor,
    marks: Sequence[int],
    numbers: Sequence[int],
    totals: Sequence[int],
    counts: Sequence[int],
) -> tuple[torch.Tensor, ...]:
    """One row of `Prompts`: ids, labels, image_id and positions, (T,) each."""
    parts: list[tuple[torch.Tensor, ...]] = []
    begin = position = 0
    for end, number in zip([*marks, len(ids)], [*numbers, None], strict=True):
        text = torch.arange(position, position + end - begin)
        parts.append((ids[begin:end], labels[begin:end], torch.full_like(text, TEXT), text))
        if number is not None:
            begin, position = end + 1, position + len(text)
            visual = (IMAGE_TOKEN_INDEX, IGNORE_INDEX, number, position)
            parts.append(tuple(ids.new_full((counts[number],), value) for value in visual))
            position += totals[number]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _visual_places(prompts: Prompts, kept: Sequence[KeptTokens]) -> tuple[torch.Tensor, list[int]]:
    """Where visual tokens stand in the flattened batch, (M,), and how many of each image were not cut off."""
    image_id = prompts.image_id.flatten()
    places = (image_id != TEXT).nonzero().flatten()
    return places, image_id[places].bincount(minlength=len(kept)).tolist()


def embed(
    prompts: Prompts, kept: Sequence[KeptTokens], embed_tokens: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The embeddings (B, T, D) of a batch, zero where there is padding; each is written into its place once.

    ``kept`` are the images' tokens in the order of their numbers; ``embed_tokens`` makes ids (M,) on the host to (M,
    D), and is asked once.
    """
    ids = prompts.ids.flatten()
    places = (ids != IMAGE_TOKEN_INDEX).nonzero().flatten()
    text = embed_tokens(ids[places])
    embeds = text.new_zeros(*prompts.ids.shape, text.shape[-1])
    flat = embeds.view(-1, text.shape[-1])
    flat[places.to(text.device, non_blocking=True)] = text
    places, counts = _visual_places(prompts, kept)
    if len(places):
        visual = torch.cat([image.features[:n].to(text) for image, n in zip(kept, counts, strict=True)])
        flat[places.to(text.device, non_blocking=True)] = visual
    return embeds


def rotary_positions(
    prompts: Prompts, kept: Sequence[KeptTokens], mask: torch.Tensor, asked: bool, gaps: bool, cache: Any
) -> torch.Tensor | None:
    """Rotary positions (B, T) after what a cache holds, 0 at padding; None where they need not be stated.

    ``mask`` (B, T) is the prompts', on the device that positions are wanted on; ``asked`` says that the caller states
    positions, so that new ones are wanted; with ``gaps`` everything stands where it would if nothing had been dropped.
    """
    if gaps:
        positions = prompts.positions.to(mask.device, non_blocking=True)
        places, counts = _visual_places(prompts, kept)
        if len(places):
            offsets = torch.cat([image.indices[:n].to(mask.device) for image, n in zip(kept, counts, strict=True)])
            positions.view(-1)[places.to(mask.device, non_blocking=True)] += offsets
    elif asked:
        positions = (mask.cumsum(1) - 1).masked_fill(~mask, 0)
    else:
        return None
    if cache is not None:
        from llava.model.language_model.kv_cache import Filling

        positions += Filling.of(cache, mask.device).following
    return positions


def _pad(rows: Sequence[torch.Tensor], value: float, left: bool) -> torch.Tensor:
    """Stack rows (T_i, ...) to (B, max T, ...)."""
    side = "left" if left else "right"
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
