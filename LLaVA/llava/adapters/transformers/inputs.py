"""A prompt's inputs without the dropped tokens: tensors in, tensors out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask

from llava.adapters.transformers.images import PromptImage
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


def kept_types(columns: KeptColumns, types: torch.Tensor, length: int) -> torch.Tensor:
    """Token types (B, T') of prompts of ``length`` columns; 0, text, where a place only pads."""
    # Assisted decoding does not count its candidates in them.
    return columns.take(torch.nn.functional.pad(types, (0, length - types.shape[1])), 0)


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
class KeptPrompt:
    """What decoding steps have to know of a pruned prompt; it hangs on the KV cache.

    It covers the prompts up to their last image alone: what follows may grow, and be cropped by assisted decoding.

    Attributes
    ----------
    length : int
        Columns of that part, as the caller counts them.
    source, present : Tensor (B, T')
        As in `KeptColumns`, of that part.
    next_position : Tensor (..., B, 1)
        Rotary position of the first column after it.
    shift : Tensor (B, 1), or None
        What to take off the positions that ``generate`` counts.
    padded : bool
        Whether any place only pads.
    """

    length: int
    source: torch.Tensor
    present: torch.Tensor
    next_position: torch.Tensor
    shift: torch.Tensor | None
    padded: bool

    @classmethod
    def of(
        cls,
        columns: KeptColumns,
        images: Sequence[PromptImage],
        positions: torch.Tensor,
        shift: torch.Tensor | None,
        length: int,
    ) -> KeptPrompt:
        """Of prompts of ``length`` columns, of which the kept ones have the rotary ``positions`` (..., B, T')."""
        end = 1 + max(int(image.columns[-1]) for image in images)
        tail = length - end
        upto = columns.source.shape[1] - tail
        present = columns.present[:, :upto]
        last = positions[..., -1:] + 1 - tail
        return cls(end, columns.source[:, :upto], present, last, shift, not bool(present.all()))

    def mask(self, given: torch.Tensor | None, total: int) -> torch.Tensor | None:
        """The attention mask (B, total) of the kept prompt and all that follows; ``given`` is the caller's."""
        if given is None:
            if not self.padded:
                return None
            following = self.present.new_ones(len(self.present), total - self.present.shape[1])
            return torch.cat([self.present, following], dim=1).long()
        prompt = given[:, : self.length].gather(1, self.source) * self.present.to(given.dtype)
        return torch.cat([prompt, given[:, self.length :]], dim=1)

    def positions(self, cached: int, new: int) -> torch.Tensor:
        """Rotary positions (..., B, new) of columns after ``cached`` ones."""
        return self.next_position + (cached - self.source.shape[1]) + torch.arange(new, device=self.source.device)


def kept_features(output: Any, images: Sequence[PromptImage], kept: Sequence[KeptTokens], listed: bool) -> Any:
    """The encoder's output with the kept tokens alone, of images in the order of the placeholders.

    A new object, since ``generate`` hands the old one over again where it does without a cache; ``listed`` says whether
    the model reads a list of features or a tensor.
    """
    edge, rows = 0, []
    for image, left in zip(images, kept, strict=True):
        rows.append(edge + left.indices)
        edge += len(image.tokens.features)
    indices = torch.cat(rows)
    features = torch.cat([left.features for left in kept])
    # Patch-level fields are of no use on a prompt of fewer tokens; others, as Ovis2's indicators, are handed on.
    fields = {name: value for name, value in output.items() if name not in PATCH_LEVEL}
    fields["pooler_output"] = [features] if listed else features[None]
    if output.get("deepstack_features") is not None:
        fields["deepstack_features"] = [_rows(level, indices) for level in output["deepstack_features"]]
    return type(output)(**fields)


def _rows(level: torch.Tensor | Sequence[torch.Tensor], indices: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in level])
    rows = rows[indices.to(rows.device)]
    return rows[None] if isinstance(level, torch.Tensor) else [rows]


CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)
"""What functions of transformers which make masks call the KV cache."""
