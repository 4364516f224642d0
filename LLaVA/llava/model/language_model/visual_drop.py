"""What leaves the rows of a batch inside the decoder: visual tokens, image by image, and the gaps behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from llava.model.visual_sequence import ImageTokens, PromptFacts, as_visual_tokens
from llava.pruning.base import Pruner, gather_tokens

TEXT = -1
"""What `visual_index` holds where no image stands."""


@dataclass(frozen=True)
class LayerDrop:
    """Drop visual tokens at the inputs of decoder layers, or in the layers before, behind their attention.

    Attributes
    ----------
    pruner : Pruner
        Sees the hidden states of each image's visual tokens at the layer.
    stages : tuple of (layer, fraction)
        Ascending 0-based layers, and how much of an image's tokens is there from the layer's input on.

    Raises
    ------
    ValueError
        For a pruner that merges tokens behind the attention, whose output it does not see.
    """

    pruner: Pruner
    stages: tuple[tuple[int, float], ...]

    def __post_init__(self):
        if self.pruner.after_attention and self.pruner.merges:
            raise ValueError(f"{type(self.pruner).__name__} merges tokens: it cannot drop behind a layer's attention")

    def drops_in(self, layer: int, totals: Sequence[int]) -> bool:
        """Whether tokens leave behind this layer's attention, of images that had ``totals`` of them."""
        fractions = dict(self.stages)
        if not self.pruner.after_attention or layer + 1 not in fractions:
            return False
        present = min((fraction for stage, fraction in self.stages if stage <= layer), default=1.0)
        left = fractions[layer + 1]
        return self.pruner.varies or any(self.pruner.budget(n, left) < self.pruner.budget(n, present) for n in totals)

    @property
    def compact(self) -> bool:
        """Whether what is kept gets new rotary positions without gaps."""
        return self.pruner.position_ids == "compact"


@dataclass(frozen=True)
class KeptPrefix:
    """What a prefill left of the prompts from a dropping layer on.

    Attributes
    ----------
    positions : Tensor (B, T'), int64
        Index into the embedded prompt of every kept token, ascending in each row (but for methods that reorder an
        image's tokens), padding first; of padding any.
    mask : Tensor (B, T'), bool
        False where a row is padded because another one kept more.
    """

    positions: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Sequences:
    """A batch of rows on their way through the decoder, before or after drops.

    Attributes
    ----------
    hidden : Tensor (B, T, D)
    valid : Tensor (B, T), bool
        False at padding.
    index : Tensor (B, T), int64
        Number of the image a position belongs to, `TEXT` for text and padding.
    ordinal : Tensor (B, T), int64
        Which of its image's visual tokens a position holds, counted before any drop; `TEXT` for text and padding.
    origin : Tensor (B, T), int64
        Index into the embedded prompt.
    prompt : Tensor (B, T), bool
        False at padding and at what is to be predicted.
    place : Tensor (B, T), int64
        Where a position stood in the rows before the latest drop.
    """

    hidden: torch.Tensor
    valid: torch.Tensor
    index: torch.Tensor
    ordinal: torch.Tensor
    origin: torch.Tensor
    prompt: torch.Tensor
    place: torch.Tensor

    @classmethod
    def start(
        cls, hidden: torch.Tensor, valid: torch.Tensor, index: torch.Tensor, prompt: torch.Tensor | None
    ) -> Sequences:
        """The embedded prompts (B, T, D), nothing dropped yet."""
        origin = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        # An image's tokens stand side by side, and begin where the number changes.
        before = torch.nn.functional.pad(index, (1, 0), value=TEXT)[:, :-1]
        begin = torch.where(index != before, origin, 0).cummax(dim=1).values
        ordinal = torch.where(index == TEXT, TEXT, origin - begin)
        prompt = valid if prompt is None else prompt.bool() & valid
        return cls(hidden, valid, index, ordinal, origin, prompt, place=origin)

    def to(self, device: torch.device) -> Sequences:
        """The same on another device."""
        return Sequences(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def take(self, source: torch.Tensor, present: torch.Tensor) -> Sequences:
        """Rows of the positions at ``source``; where not ``present``, a row is only padded and belongs to no image.

        Parameters
        ----------
        source : Tensor (B, T'), int64
            Where each position stood; any valid place at padding.
        present : Tensor (B, T'), bool
        """

        def taken(values: torch.Tensor, padding: int) -> torch.Tensor:
            return values.gather(1, source).masked_fill(~present, padding)

        return Sequences(
            hidden=gather_tokens(self.hidden, source),
            valid=present,
            index=taken(self.index, TEXT),
            ordinal=taken(self.ordinal, TEXT),
            origin=self.origin.gather(1, source),
            prompt=taken(self.prompt, False),
            place=source,
        )


def drop_visual_tokens(
    rows: Sequences,
    facts: Sequence[tuple[ImageTokens, PromptFacts]],
    pruner: Pruner,
    fraction: float,
    seen: Mapping[str, torch.Tensor],
) -> Sequences:
    """Apply a pruner to every image of every row, and close the gaps.

    Parameters
    ----------
    rows : Sequences
    facts : sequence
        What is known of each image, by its number.
    pruner : Pruner
    fraction : float
        Of an image's tokens before any drop, what is to be left; 0 drops them all.
    seen : mapping of str to Tensor (B, T, ...)
        Attention that the pruner asked for, by its field of `VisualTokens`.

    Returns
    -------
    Sequences
        Padded on the left.
    """
    hidden = rows.hidden
    keep = rows.valid.clone()
    # What each kept place will hold: usually its own token, another one where a method reorders.
    source = torch.arange(hidden.shape[1], device=hidden.device).repeat(len(hidden), 1)
    merged = hidden.clone() if pruner.merges else hidden
    for members in _spans(rows.index, facts, alone=pruner.varies):
        row = torch.tensor([row for row, _, _ in members])[:, None].to(hidden.device, non_blocking=True)
        places = torch.stack([place for _, _, place in members]).to(hidden.device, non_blocking=True)  # (M, n)
        keep[row, places] = False
        if fraction == 0:
            continue
        images = [image for _, image, _ in members]
        total = len(facts[images[0]][0].features)
        tokens = as_visual_tokens(
            hidden[row, places],
            # Rounded as before the decoder: a fraction of what the image had, at most what is left of it.
            min(places.shape[1], pruner.budget(total, fraction)),
            [facts[image][0] for image in images],
            [facts[image][1] for image in images],
            alive=rows.ordinal[row, places] if total != places.shape[1] else None,
            **{name: attention[row, places] for name, attention in seen.items()},
        )
        kept = pruner.reduce(tokens)
        slots = places.gather(1, kept.indices.sort(dim=-1).values)
        keep[row, slots] = True
        source[row, slots] = places.gather(1, kept.indices)
        if pruner.merges:
            merged[row, slots] = kept.features
    longest = int(keep.sum(dim=1).max())
    order = keep.int().argsort(dim=1, stable=True)[:, -longest:]
    kept = rows.take(source.gather(1, order), keep.gather(1, order))
    return replace(kept, hidden=gather_tokens(merged, order)) if pruner.merges else kept


def choose_raters(rows: Sequences, pruner: Pruner) -> torch.Tensor:
    """The text tokens behind each row's first image that the pruner takes as raters, as places in the prompt.

    Returns
    -------
    Tensor (B, T), bool
        Over the embedded prompts, before any drop.
    """
    chosen = torch.zeros_like(rows.valid)
    device = chosen.device
    for row, (images, prompt) in enumerate(zip(rows.index.cpu(), rows.prompt.cpu(), strict=True)):
        visual = images != TEXT
        text = (~visual & prompt & (visual.cumsum(0) > 0)).nonzero().flatten()
        if len(text):
            visual = visual.nonzero().flatten().to(device, non_blocking=True)
            text = text.to(device, non_blocking=True)
            chosen[row, text] = pruner.raters(rows.hidden[row, visual], rows.hidden[row, text])
    return chosen


def refuse_images_without_text(rows: Sequences, pruner: Pruner) -> None:
    """Raise a `ValueError` if an image has no text of the prompt behind it, for methods that ask the text."""
    text = rows.prompt & (rows.index == TEXT)
    behind = text.flip(1).int().cumsum(dim=1).flip(1)
    if bool(((behind == 0) & (rows.index != TEXT)).any()):
        raise ValueError(
            f"{type(pruner).__name__} ranks visual tokens by the attention of the text behind them, but an image of "
            "the prompt has none"
        )


def _spans(
    index: torch.Tensor, facts: Sequence[tuple[ImageTokens, PromptFacts]], alone: bool
) -> list[list[tuple[int, int, torch.Tensor]]]:
    """Groups of (row, image, places) of the same size and layout, then and now; `alone`: every image by itself.

    Places are on the host.
    """
    groups: dict[object, list[tuple[int, int, torch.Tensor]]] = {}
    for row, images in enumerate(index.cpu()):  # one look at the whole batch
        for image in images.unique().tolist():
            if image != TEXT:
                places = (images == image).nonzero().flatten()
                then = facts[image][0]
                kind = (row, image) if alone else (len(then.features), then.layout, len(places))
                groups.setdefault(kind, []).append((row, image, places))
    return list(groups.values())
