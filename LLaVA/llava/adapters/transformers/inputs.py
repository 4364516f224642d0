"""A prompt's inputs without the dropped tokens: tensors in, tensors out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers.masking_utils import create_causal_mask

from llava.adapters.transformers.images import PromptImage
from llava.constants import IGNORE_INDEX
from llava.pruning.base import KeptTokens

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
PATCH_LEVEL = ("last_hidden_state", "hidden_states", "attentions")
Output = TypeVar("Output")


@dataclass(frozen=True)
class KeptColumns:
    """Which columns of a batch of prompts are left.

    Attributes
    ----------
    source : Tensor (B, T'), int64
        The column that each kept place comes from.
    present : Tensor (B, T'), bool
        False where a place only pads its row. What it holds there is a dropped token, and must become text.
    length : int
        T, the columns of the whole prompts.
    """

    source: torch.Tensor
    present: torch.Tensor
    length: int

    @classmethod
    def of(cls, valid: torch.Tensor, images: Sequence[PromptImage], kept: Sequence[KeptTokens]) -> KeptColumns:
        """Close the gaps in ``valid`` (B, T): rows are padded on the right where all of theirs end in padding or not
        at all and one does, else on the left."""
        device, valid = valid.device, valid.cpu()
        keep, source = valid.clone(), torch.arange(valid.shape[1]).repeat(len(valid), 1)
        for image, left in zip(images, kept, strict=True):
            indices = left.indices.cpu()
            keep[image.row, image.columns] = False
            slots = image.columns[indices.sort().values]
            keep[image.row, slots] = True
            source[image.row, slots] = image.columns[indices]
        longest = int(keep.sum(dim=1).max())
        if bool(valid[:, 0].all()) and not bool(valid[:, -1].all()):
            order = (~keep).int().argsort(dim=1, stable=True)[:, :longest]
        else:
            order = keep.int().argsort(dim=1, stable=True)[:, -longest:]
        return cls(source.gather(1, order).to(device), keep.gather(1, order).to(device), valid.shape[1])

    def to(self, device: torch.device) -> KeptColumns:
        """The same on another device."""
        return KeptColumns(self.source.to(device), self.present.to(device), self.length)

    def take(self, values: torch.Tensor, fill: int) -> torch.Tensor:
        """What stands at the kept columns of ``values`` (B, T): (B, T'); ``fill`` where a place only pads."""
        # Assisted decoding does not count its candidates in the token types.
        values = torch.nn.functional.pad(values, (0, self.length - values.shape[1]))
        return values.gather(1, self.source).masked_fill(~self.present, fill)

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) -> (B, T'): what follows padding is not predicted from it."""
        follows_padding = ~torch.nn.functional.pad(self.present[:, :-1], (1, 0), value=True)
        return self.take(labels, IGNORE_INDEX).masked_fill(follows_padding, IGNORE_INDEX)

    def positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotary positions (B, T) or (3 or 4, B, T) of what is kept, gaps and all; 0 at padding.

        Of four rows the first only tells packed sequences apart, and must have no gaps.
        """
        source = self.source.expand(*positions.shape[:-2], -1, -1)
        kept = positions.expand(*positions.shape[:-2], len(self.source), -1).gather(-1, source)
        kept = kept.masked_fill(~self.present, 0)
        if positions.ndim == 3 and len(positions) == 4:
            kept[0] = self.counted()
        return kept

    def features(self, values: torch.Tensor) -> torch.Tensor:
        """What stands at the kept columns of ``values`` (..., B or 1, T, D): (..., B, T', D), anything at padding."""
        source = self.source.to(values.device)[..., None]
        leading, (length, width) = values.shape[:-3], values.shape[-2:]
        values = values.expand(*leading, len(source), length, width)
        return values.gather(-2, source.expand(*leading, *source.shape[:2], width))

    def counted(self) -> torch.Tensor:
        """Positions (B, T') without gaps, from 0."""
        return (self.present.long().cumsum(1) - 1).clamp_min(0)

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, T', V) where the caller counts them: (B, T, V), zeros at what was dropped."""
        full = logits.new_zeros(len(logits), self.length + 1, logits.shape[-1])
        # Places that only pad a row write into a column of their own.
        columns = self.source.masked_fill(~self.present, self.length)
        return full.scatter(1, columns[..., None].expand_as(logits), logits)[:, : self.length]


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
        cls, columns: KeptColumns, images: Sequence[PromptImage], positions: torch.Tensor, shift: torch.Tensor | None
    ) -> KeptPrompt:
        """Of prompts whose kept columns have the rotary ``positions`` (..., B, T')."""
        end = 1 + max(int(image.columns[-1]) for image in images)
        tail = columns.length - end
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
        """Rotary positions (..., B, new) of columns behind ``cached`` ones."""
        return self.next_position + (cached - self.source.shape[1]) + torch.arange(new, device=self.source.device)


def kept_features(output: Output, images: Sequence[PromptImage], kept: Sequence[KeptTokens], listed: bool) -> Output:
    """The encoder's output with the kept tokens alone.

    A new object, since ``generate`` hands the old one over again where it does without a cache.

    Parameters
    ----------
    output : ModelOutput
    images, kept
        In the order of the placeholders.
    listed : bool
        Whether the model reads a list of features or a tensor.
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


CACHES = ("cache", "past_key_values")
"""Names of the KV cache; transformers 5.24 renamed it."""
CACHE = next(name for name in CACHES if name in inspect.signature(create_causal_mask).parameters)
"""The one that functions of transformers which make masks take."""


def cache_of(holder: Mapping[str, Any]) -> Any | None:
    """The KV cache among arguments or in an output."""
    found = (holder.get(name) for name in CACHES)
    return next((cache for cache in found if cache is not None), None)
