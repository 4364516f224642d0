"""What a prefill learns of its prompts: made where they are spliced, read by the decoder, and by whoever reports it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llava.model.active_pruner import ActivePruner
from llava.model.prompt import Prompts
from llava.pruning.rows import KeptColumns
from llava.pruning.tokens import ImageTokens, KeptTokens


@dataclass
class Prefill:
    """One batch of prompts with images.

    Attributes
    ----------
    active : ActivePruner
        What prunes it.
    image_id : Tensor (B, T), int64
        The image that each embedded position belongs to, counted over the batch; -1 for text and padding.
    mask : Tensor (B, T), bool, or None
        False at padding; None where there is none.
    images : sequence of ImageTokens
        By their number; empty unless the decoder drops tokens.
    kept : sequence of Tensor (k,), int64
        Which tokens of each image entered the decoder.
    tokens_per_layer : sequence of tuple of int
        What each decoder layer sees of each image, in the order of the prompts.
    tokens_after_attention : sequence of tuple of int
        The same in each layer's output projection and feed-forward block: fewer than the layer sees where a method
        drops after the attention.
    token_counts : sequence of (total, kept)
        Of each image; kept is what the last decoder layer sees.
    left : KeptColumns or None
        What the last drop inside the decoder left of the embedded prompts.
    """

    active: ActivePruner
    image_id: torch.Tensor
    mask: torch.Tensor | None
    images: Sequence[ImageTokens]
    kept: Sequence[torch.Tensor]
    tokens_per_layer: Sequence[tuple[int, ...]]
    tokens_after_attention: Sequence[tuple[int, ...]]
    token_counts: Sequence[tuple[int, int]]
    left: KeptColumns | None = None

    @classmethod
    def of(
        cls,
        active: ActivePruner,
        images: Sequence[ImageTokens],
        kept: Sequence[KeptTokens],
        prompts: Prompts,
        mask: torch.Tensor,
        layers: int,
    ) -> Prefill:
        """Of prompts with images, of which the ``kept`` tokens enter a decoder of so many layers; the mask is there."""
        counts = [(len(image), len(left.features), layers) for image, left in zip(images, kept, strict=True)]
        per_layer = [active.tokens_per_layer(*count) for count in counts]
        return cls(
            active,
            prompts.image_id.to(mask.device, non_blocking=True),
            None if bool(prompts.mask.all()) else mask,
            images if active.inside_decoder else (),
            [left.indices for left in kept],
            per_layer,
            [active.tokens_after_attention(*count) for count in counts],
            [(total, seen[-1]) for (total, _, _), seen in zip(counts, per_layer, strict=True)],
        )

    def tokens_left(self, image: int) -> torch.Tensor:
        """Which tokens of an image were there after the last drop: int64 (k,)."""
        if self.left is None:
            return self.kept[image]
        places = self.image_id == image  # (B, T)
        row = int(places.any(dim=1).nonzero()[0])
        columns = self.left.source[row][self.left.present[row]]
        columns = columns[places[row, columns]]
        return self.kept[image].to(columns.device)[columns - places[row].int().argmax()]

    def reorder(self, columns: KeptColumns) -> None:
        """Follow a batch whose columns, all of which are kept, were moved."""
        self.image_id, self.mask = columns.take(self.image_id), columns.present

    def image_id_of(self, rows: int) -> torch.Tensor:
        """``image_id`` of a batch of ``rows``, in which generation may have repeated each prompt, for beams for one."""
        return self.image_id.repeat_interleave(rows // len(self.image_id), dim=0)


class PreparedInputs(tuple):
    """LLaVA's six values for the language model, and the `Prefill` that was learnt while they were made."""

    prefill: Prefill

    def __new__(cls, values: Sequence, prefill: Prefill) -> PreparedInputs:
        self = super().__new__(cls, values)
        self.prefill = prefill
        return self


def latest(name: str) -> property:
    """A field of a model's latest `Prefill`, as a property of the model; empty before the first."""
    return property(lambda model: getattr(model.latest_prefill, name, ()), doc=f"See `Prefill.{name}`.")
