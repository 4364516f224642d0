"""Where text and visual tokens stand in the prompts that a language model reads.

A prompt is laid out as integers first, on the host, which has to know every length: what each position holds, which
image it belongs to, what is to be predicted and where it would stand if nothing had been dropped. The embeddings are
then written into their places on the device, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.language_model.visual_drop import TEXT
from llava.model.visual_cache import Span

__all__ = ["Prompt", "Prompts", "Visual", "assign_images", "embed", "lay_out", "original_positions", "stack"]


class Visual(NamedTuple):
    """An image's tokens in a row.

    Attributes
    ----------
    begin : int
        Where they begin.
    place : int
        Where they would begin if nothing had been dropped.
    features : Tensor (k, D)
    indices : Tensor (k,), int64
        Where each stood among the image's tokens.
    """

    begin: int
    place: int
    features: torch.Tensor
    indices: torch.Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt, every image mark replaced by its image's tokens.

    Attributes
    ----------
    ids : Tensor (T,), int64
        Text, and `IMAGE_TOKEN_INDEX` at each visual token.
    labels : Tensor (T,), int64
        What is to be predicted.
    images : Tensor (T,), int64
        The image that each position belongs to, `TEXT` elsewhere.
    positions : Tensor (T,), int64
        Where the text would stand if nothing had been dropped; of visual tokens `visual` tells.
    visual : tuple of Visual
    """

    ids: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    positions: torch.Tensor
    visual: tuple[Visual, ...]

    def cut(self, length: int | None) -> Prompt:
        """The first `length` positions; all of them for None."""
        if length is None or len(self.ids) <= length:
            return self
        visual = tuple(
            Visual(begin, place, features[: length - begin], indices[: length - begin])
            for begin, place, features, indices in self.visual
            if begin < length
        )
        return Prompt(self.ids[:length], self.labels[:length], self.images[:length], self.positions[:length], visual)


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, padded on one side: tensors (B, T) as in `Prompt`, and what is content.

    Attributes
    ----------
    ids, labels, images, positions : Tensor (B, T), int64
    mask : Tensor (B, T), bool
    visual : list of (row, Visual)
        With the padding counted where the tokens begin.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    visual: list[tuple[int, Visual]]


def lay_out(ids: torch.Tensor, labels: torch.Tensor, visual: Sequence[tuple[int, Span]]) -> Prompt:
    """Put images in the place of one prompt's marks.

    Parameters
    ----------
    ids, labels : Tensor (T,), int64
        Text with image marks, and what is to be predicted; on the host.
    visual : sequence of (number, span)
        The images that the marks stand for.
    """
    marks = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    stretches: list[tuple[torch.Tensor, ...]] = []  # of ids, labels, images and positions
    laid: list[Visual] = []
    begin = place = length = 0
    for end, image in zip([*marks, len(ids)], [*visual, None], strict=True):
        n = end - begin
        images, positions = ids.new_full((n,), TEXT), torch.arange(place, place + n)
        stretches.append((ids[begin:end], labels[begin:end], images, positions))
        begin, place, length = end + 1, place + n, length + n
        if image is None:
            break
        number, span = image
        k = len(span.features)
        marked, unasked = ids.new_full((k,), IMAGE_TOKEN_INDEX), labels.new_full((k,), IGNORE_INDEX)
        stretches.append((marked, unasked, ids.new_full((k,), number), ids.new_zeros(k)))
        laid.append(Visual(length, place, span.features, span.indices))
        place, length = place + span.total, length + k
    return Prompt(*(torch.cat(column) for column in zip(*stretches, strict=True)), tuple(laid))


def stack(prompts: Sequence[Prompt], left: bool) -> Prompts:
    """Prompts of different lengths as one batch, padded on the left or on the right."""
    longest = max(len(prompt.ids) for prompt in prompts)
    begins = [longest - len(prompt.ids) if left else 0 for prompt in prompts]
    return Prompts(
        ids=_pad([prompt.ids for prompt in prompts], IMAGE_TOKEN_INDEX, left),
        labels=_pad([prompt.labels for prompt in prompts], IGNORE_INDEX, left),
        images=_pad([prompt.images for prompt in prompts], TEXT, left),
        positions=_pad([prompt.positions for prompt in prompts], 0, left),
        mask=_pad([torch.ones_like(prompt.ids, dtype=torch.bool) for prompt in prompts], False, left),
        visual=[
            (row, visual._replace(begin=begins[row] + visual.begin))
            for row, prompt in enumerate(prompts)
            for visual in prompt.visual
        ],
    )


def embed(prompts: Prompts, embed_tokens: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The embeddings (B, T, D) of a batch, zero where there is padding; each is written into its place once.

    Parameters
    ----------
    prompts : Prompts
    embed_tokens : callable
        Ids (M,) on the host -> (M, D); asked once.
    """
    places = (prompts.ids != IMAGE_TOKEN_INDEX).flatten().nonzero().flatten()
    text = embed_tokens(prompts.ids.flatten()[places])
    embeds = text.new_zeros(*prompts.ids.shape, text.shape[-1])
    embeds.view(-1, text.shape[-1])[places.to(text.device, non_blocking=True)] = text
    for row, visual in prompts.visual:
        embeds[row, visual.begin : visual.begin + len(visual.features)] = visual.features.to(text)
    return embeds


def original_positions(prompts: Prompts, device: torch.device) -> torch.Tensor:
    """Where each position (B, T) would stand if nothing had been dropped; 0 at padding."""
    positions = prompts.positions.to(device, non_blocking=True)
    for row, visual in prompts.visual:
        end = visual.begin + len(visual.indices)
        positions[row, visual.begin : end] = visual.place + visual.indices.to(device)
    return positions


def assign_images(marks_of_rows: Sequence[int], available: int) -> list[list[int]]:
    """Which images stand in each row: rows take them in order, a row without a mark passes over one.

    Images that a single prompt has no mark for are ignored, as in the original LLaVA. Of several prompts they are
    refused: nothing says whose they are, and a row that is short of a mark would shift the images of all later rows.

    Parameters
    ----------
    marks_of_rows : sequence of int
        Image marks in each row.
    available : int
        How many images there are.

    Raises
    ------
    IndexError
        If the rows take more.
    ValueError
        If several rows take fewer.
    """
    rows, taken = [], 0
    for marks in marks_of_rows:
        rows.append(list(range(taken, taken + marks)))
        taken += max(1, marks)
    if taken > available:
        raise IndexError(
            f"The prompts take {taken} images ({list(marks_of_rows)} image marks a row, and one for a row without), "
            f"but only {available} came"
        )
    if taken < available and len(rows) > 1:
        raise ValueError(
            f"{available} images came, but the prompts take {taken} ({list(marks_of_rows)} image marks a row, and one "
            "for a row without): which of them belong to which row is not known"
        )
    return rows


def _pad(rows: Sequence[torch.Tensor], value: float, left: bool) -> torch.Tensor:
    """Stack rows (T_i, ...) to (B, max T, ...)."""
    side = "left" if left else "right"
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
