"""A prompt's inputs without the dropped tokens: tensors in, tensors out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask

from llava.adapters.transformers.images import PromptImage
from llava.constants import IGNORE_INDEX
from llava.pruning.rows import CACHE_NAMES, KeptColumns
from llava.pruning.tokens import KeptTokens

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
PATCH_LEVEL = ("last_hidden_state", "hidden_states", "attentions")


def kept_columns(valid: torch.Tensor, images: Sequence[PromptImage], kept: Sequence[KeptTokens]) -> KeptColumns:
    """The columns of ``valid`` (B, T) without the dropped tokens.

    Rows are padded on the right where all of theirs end in padding or not at all and one does, else on the left. What
    only pads holds a dropped token, and must become text.
    """
    device, valid = valid.device, valid.cpu()
    keep, source = valid.clone(), torch.arange(valid.shape[1]).repeat(len(valid), 1)
    for image, left in zip(images, kept, strict=True):
        indices = left.indices.cpu()
        keep[image.row, image.columns] = False
        slots = image.columns[indices.sort().values]
        keep[image.row, slots] = True
        source[image.row, slots] = image.columns[indices]
    pad_right = bool(valid[:, 0].all()) and not bool(valid[:, -1].all())
    return KeptColumns.closing_gaps(keep, pad_right).of_tokens_at(source).to(device)


def token_types(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Token types (B, T) among the inputs, by name; 0, text, for the candidates that assisted decoding leaves out."""
    types = {name: inputs[name] for name in TOKEN_TYPES if inputs.get(name) is not None}
    length = inputs["input_ids"].shape[1]
    return {name: torch.nn.functional.pad(own, (0, length - own.shape[1])) for name, own in types.items()}


def kept_inputs(inputs: Mapping[str, Any], columns: KeptColumns, pad_id: int) -> dict[str, torch.Tensor]:
    """Ids, token types and labels of what is kept; text where a place only pads."""
    found = {name: columns.take(own, 0) for name, own in token_types(inputs).items()}
    if inputs.get("labels") is not None:
        found["labels"] = columns.labels(inputs["labels"], IGNORE_INDEX)
    return found | {"input_ids": columns.take(inputs["input_ids"], pad_id)}


def kept_positions(columns: KeptColumns, positions: torch.Tensor) -> torch.Tensor:
    """Rotary positions (B, T) or (3 or 4, B, T) of what is kept, gaps and all; 0 at padding.

    Of four rows the first only tells packed sequences apart, and must have no gaps.
    """
    if positions.ndim == 2:
        return columns.take(positions.expand(len(columns.source), -1), 0)
    kept = torch.stack([kept_positions(columns, axis) for axis in positions])
    if len(positions) == 4:
        kept[0] = columns.positions()
    return kept


def kept_rotary(columns: KeptColumns, values: torch.Tensor) -> torch.Tensor:
    """Cosines or sines (..., B or 1, T, D) of what is kept: (..., B, T', D), anything at padding."""
    if values.ndim > 3:
        return torch.stack([kept_rotary(columns, axis) for axis in values])
    return columns.to(values.device).take(values.expand(len(columns.source), -1, -1))


def tokens_left(columns: KeptColumns, row: int, places: torch.Tensor) -> torch.Tensor:
    """Which tokens of an image, at ``places`` (N,) of a row, are among ``columns``, in their order: (k,), int64."""
    left = columns.source[row][columns.present[row]]
    places = places.to(left.device)
    index = torch.searchsorted(places, left).clamp(max=len(places) - 1)
    return index[places[index] == left]


def spread(logits: torch.Tensor, columns: KeptColumns, length: int) -> torch.Tensor:
    """Logits (B, T', V) where the caller counts ``length`` columns: (B, T, V), zeros at what was dropped."""
    full = logits.new_zeros(len(logits), length + 1, logits.shape[-1])
    # Places that only pad a row write into a column of their own.
    source = columns.source.masked_fill(~columns.present, length)
    return full.scatter(1, source[..., None].expand_as(logits), logits)[:, :length]


@dataclass(frozen=True)
class Prefill:
    """Prompts that lose tokens, between a call's inputs and its outputs.

    Attributes
    ----------
    images : sequence of PromptImage
    length : int
        Columns of the prompts, as the caller counts them.
    entered : KeptColumns
        Which of them enter the decoder.
    positions : Tensor (..., B, T')
        Their rotary positions.
    shift : Tensor (B, 1), or None
        See `KeptPrompt`.
    labels : Tensor (B, length), or None
        Where layers drop tokens too, and the loss is computed after them.
    """

    images: Sequence[PromptImage]
    length: int
    entered: KeptColumns
    positions: torch.Tensor
    shift: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    def in_cache(self, left: Mapping[int, KeptColumns], cached: int) -> KeptPrompt:
        """What decoding steps have to know, with a cache that counts ``cached`` columns of the prompts.

        It ends with the last image: what follows may grow, and be cropped by assisted decoding.
        """
        tail = self.length - 1 - max(int(image.columns[-1]) for image in self.images)
        if left and not bool(self.entered.present[:, -1].all()):
            tail = 0  # layers that drop move padding to the left
        entered = self.entered.without_last(tail)
        return KeptPrompt(
            self.length - tail,
            cached - tail,
            entered,
            {layer: columns.without_last(tail) for layer, columns in left.items()},
            self.positions[..., -1:] + 1 - tail,
            self.shift,
            not bool(entered.present.all()),
        )


@dataclass(frozen=True)
class KeptPrompt:
    """What decoding steps have to know of a pruned prompt, or its beginning; it hangs on the KV cache.

    Attributes
    ----------
    length : int
        Its columns, as the caller counts them.
    cached : int
        How many of them the cache counts.
    entered : KeptColumns
        Which of them entered the decoder.
    left : mapping of int to KeptColumns
        Layer at whose input tokens were dropped -> which of those that entered it and the deeper ones hold.
    next_position : Tensor (..., B, 1)
        Rotary position of the first column after it.
    shift : Tensor (B, 1), or None
        What to take off the positions that ``generate`` counts.
    padded : bool
        Whether any place only pads.
    """

    length: int
    cached: int
    entered: KeptColumns
    left: Mapping[int, KeptColumns]
    next_position: torch.Tensor
    shift: torch.Tensor | None
    padded: bool

    def mask(self, given: torch.Tensor | None, following: int) -> torch.Tensor | None:
        """The attention mask (B, T) of it and ``following`` columns after it; ``given`` is the caller's."""
        present = self.entered.present
        if given is None:
            after = present.new_ones(len(present), following)
            return torch.cat([present, after], dim=1).long() if self.padded else None
        return torch.cat([self.entered.take(given[:, : self.length], 0), given[:, self.length :]], dim=1)

    def positions(self, since: int, new: int) -> torch.Tensor:
        """Rotary positions (..., B, new) of columns, when there are ``since`` others after it already."""
        return self.next_position + torch.arange(since, since + new, device=self.next_position.device)


def all_features(output: Any) -> Any:
    """An encoder's whole output, with features in the container that the model reads."""
    if output.encoding.listed:
        return output
    return type(output)(**{**output, "pooler_output": torch.stack(output.pooler_output)})


def kept_features(output: Any, images: Sequence[PromptImage], kept: Sequence[KeptTokens]) -> Any:
    """An encoder's output with the kept tokens alone, of images in the order of the placeholders.

    A new object, since ``generate`` hands the old one over again where it does without a cache.
    """
    edge, rows = 0, []
    for image, left in zip(images, kept, strict=True):
        rows.append(edge + left.indices)
        edge += len(image.tokens.features)
    indices = torch.cat(rows)
    features = torch.cat([left.features for left in kept])
    # Patch-level fields are of no use on a prompt of fewer tokens; others, as Ovis2's indicators, are handed on.
    fields = {name: value for name, value in output.items() if name not in PATCH_LEVEL}
    fields["pooler_output"] = [features] if output.encoding.listed else features[None]
    if output.get("deepstack_features") is not None:
        fields["deepstack_features"] = [_rows(level, indices) for level in output["deepstack_features"]]
    return type(output)(**fields)


def _rows(level: torch.Tensor | Sequence[torch.Tensor], indices: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in level])
    rows = rows[indices.to(rows.device)]
    return rows[None] if isinstance(level, torch.Tensor) else [rows]


CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)
"""What functions of transformers which make masks call the KV cache."""
