"""The rows of a batch inside a decoder, whoever's it is, and how image tokens leave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from llava.pruning.base import Pruner
from llava.pruning.signals import TEXT_SIGNALS
from llava.pruning.tokens import ImageTokens, VisualTokens

TEXT = -1
"""The image number of text and padding."""

CACHE_NAMES = ("cache", "past_key_values")
"""transformers 5.24 renamed ``past_key_values`` to ``cache``."""


def cache_of(holder: Mapping[str, Any]) -> Any | None:
    """The KV cache among arguments or in an output of a decoder."""
    return next((holder[name] for name in CACHE_NAMES if holder.get(name) is not None), None)


@dataclass(frozen=True)
class KeptColumns:
    """Which columns of a batch are left after a drop; `take` applies it to anything that goes along the sequence.

    Attributes
    ----------
    source : Tensor (B, T'), int64
        The column that each kept place comes from.
    present : Tensor (B, T'), bool
        False where a place only pads its row. It comes from a dropped column, of which nothing may live on.
    """

    source: torch.Tensor
    present: torch.Tensor

    def to(self, device: torch.device) -> KeptColumns:
        """The same on another device."""
        return KeptColumns(self.source.to(device), self.present.to(device))

    @classmethod
    def whole(cls, valid: torch.Tensor) -> KeptColumns:
        """All columns of ``valid`` (B, T), bool, which is False at padding."""
        return cls(torch.arange(valid.shape[1], device=valid.device).repeat(len(valid), 1), valid)

    @classmethod
    def closing_gaps(cls, keep: torch.Tensor, pad_right: bool = False) -> KeptColumns:
        """The columns of ``keep`` (B, T), bool, side by side, and padding to the length of the longest row."""
        return cls.sorted(keep, pad_right, longest=int(keep.sum(dim=1).max()))

    @classmethod
    def sorted(cls, keep: torch.Tensor, pad_right: bool = False, longest: int | None = None) -> KeptColumns:
        """The same with padding to a given length, by default to that of ``keep`` itself."""
        order = (~keep if pad_right else keep).int().argsort(dim=1, stable=True)
        if longest is not None:
            order = order[:, :longest] if pad_right else order[:, keep.shape[1] - longest :]
        return cls(order, keep.gather(1, order))

    def without_last(self, n: int) -> KeptColumns:
        """All but the last ``n`` places."""
        end = self.source.shape[1] - n
        return KeptColumns(self.source[:, :end], self.present[:, :end])

    def of_tokens_at(self, source: torch.Tensor) -> KeptColumns:
        """The same where each column (B, T) is to hold the token of another one, as a method that reorders has it."""
        return KeptColumns(source.gather(1, self.source), self.present)

    def take(self, values: torch.Tensor, fill: Any = None) -> torch.Tensor:
        """What stands at the kept columns of ``values`` (B, T, ...): (B, T', ...).

        Where a place only pads it holds ``fill``, or with None whatever stood there.
        """
        tail = values.shape[2:]
        source = self.source.view(*self.source.shape, *(1 for _ in tail)).expand(-1, -1, *tail)
        kept = values.gather(1, source)
        return (
            kept if fill is None else kept.masked_fill(~self.present.view(*source.shape[:2], *(1 for _ in tail)), fill)
        )

    def labels(self, labels: torch.Tensor, ignored: int) -> torch.Tensor:
        """Labels (B, T) -> (B, T'): what follows padding is not predicted from it, and gets ``ignored``."""
        follows_padding = ~torch.nn.functional.pad(self.present[:, :-1], (1, 0), value=True)
        return self.take(labels, ignored).masked_fill(follows_padding, ignored)

    def positions(self) -> torch.Tensor:
        """Positions (B, T') without gaps, from 0; 0 at padding on the left."""
        return (self.present.long().cumsum(dim=1) - 1).clamp_min(0)


@dataclass(frozen=True)
class Rows:
    """A batch of rows on their way through a decoder, before or after drops.

    Attributes
    ----------
    hidden : Tensor (B, T, D)
    valid : Tensor (B, T), bool
        False at padding.
    image_id : Tensor (B, T), int64
        Number of the image that a position belongs to, `TEXT` for text and padding.
    original_position : Tensor (B, T), int64
        Which of its image's tokens a position holds, counted before any drop; `TEXT` for text and padding.
    column : Tensor (B, T), int64
        Index into the embedded prompt.
    prompt : Tensor (B, T), bool
        False at padding and at what is to be predicted.
    side : mapping of name to Tensor (B, T, ...)
        Whatever else a family of models has along the sequence: positions of several axes, token types, features that
        are added at deeper layers. Padding keeps what stood there.
    """

    hidden: torch.Tensor
    valid: torch.Tensor
    image_id: torch.Tensor
    original_position: torch.Tensor
    column: torch.Tensor
    prompt: torch.Tensor
    side: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        hidden: torch.Tensor,
        valid: torch.Tensor,
        image_id: torch.Tensor,
        prompt: torch.Tensor | None = None,
        entered: Sequence[torch.Tensor] = (),
        **side: torch.Tensor,
    ) -> Rows:
        """Embedded prompts (B, T, D), nothing dropped inside the decoder yet.

        Images are numbered in the order in which they stand in a row; text may stand between the tokens of one.
        ``entered`` says which tokens of each image (k,) stand there in this order; all of them if left out.
        """
        visual = image_id != TEXT
        count = visual.cumsum(dim=1) - 1
        latest = image_id.cummax(dim=1).values
        begins = visual & (latest != torch.nn.functional.pad(latest, (1, 0), value=TEXT)[:, :-1])
        place = count - torch.where(begins, count, 0).cummax(dim=1).values
        if len(entered):
            lengths = torch.tensor([0, *(len(own) for own in entered)]).cumsum(0).to(place.device, non_blocking=True)
            known = torch.cat(list(entered)).to(place.device)
            place = known[(lengths[image_id.clamp_min(0)] + place).clamp_max(len(known) - 1)]
        return cls(
            hidden,
            valid,
            image_id,
            original_position=torch.where(visual, place, TEXT),
            column=torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1),
            prompt=valid if prompt is None else prompt.bool() & valid,
            side=side,
        )

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "side"}
        moved = {name: values.to(device) for name, values in own.items()}
        return Rows(**moved, side={name: values.to(device) for name, values in self.side.items()})

    def take(self, columns: KeptColumns) -> Rows:
        """The rows at the kept columns: everything that goes along the sequence; what only pads belongs to no image."""
        return Rows(
            hidden=columns.take(self.hidden),
            valid=columns.present,
            image_id=columns.take(self.image_id, TEXT),
            original_position=columns.take(self.original_position, TEXT),
            column=columns.take(self.column),
            prompt=columns.take(self.prompt, False),
            side={name: columns.take(values) for name, values in self.side.items()},
        )

    @property
    def text(self) -> torch.Tensor:
        """Where text of the prompt stands: (B, T), bool."""
        return self.prompt & (self.image_id == TEXT)


def drop_image_tokens(
    rows: Rows,
    images: Sequence[ImageTokens],
    pruner: Pruner,
    fraction: float,
    seen: Mapping[str, torch.Tensor],
) -> Rows:
    """Apply a method to every image of every row, and close the gaps.

    Parameters
    ----------
    rows : Rows
    images : sequence of ImageTokens
        By their number.
    pruner : Pruner
    fraction : float
        Of an image's tokens before any drop, what is to be left; 0 drops them all.
    seen : mapping of str to Tensor (B, T, ...)
        Signals of the decoder for all that is there, by their name; those of the text after an image are taken from
        them.

    Returns
    -------
    Rows
        Padded on the left.
    """
    hidden = rows.hidden
    # What the layer before saw may be on another device.
    seen = {name: values.to(hidden.device, non_blocking=True) for name, values in seen.items()}
    keep = rows.valid.clone()
    # What each kept place will hold: usually its own token, another one where a method reorders.
    source = torch.arange(hidden.shape[1], device=hidden.device).repeat(len(hidden), 1)
    merged = hidden.clone() if pruner.merges else hidden
    of_text = {name: seen[TEXT_SIGNALS[name]] for name in pruner.needs & TEXT_SIGNALS.keys()}
    for members in _groups(rows.image_id, images, alone=pruner.varies):
        row = torch.tensor([row for row, _, _ in members])[:, None].to(hidden.device, non_blocking=True)
        places = torch.stack([places for _, _, places in members]).to(hidden.device, non_blocking=True)  # (M, n)
        keep[row, places] = False
        if fraction == 0:
            continue
        total, now = len(images[members[0][1]]), places.shape[1]
        tokens = VisualTokens.of(
            [images[image] for _, image, _ in members],
            # Rounded as before the decoder: a fraction of what the image had, at most what is left of it.
            min(now, pruner.kept_count(total, fraction)),
            hidden[row, places],
            left=None if total == now else rows.original_position[row, places],
            **{name: values[row, places] for name, values in seen.items() if name in pruner.needs},
            **{name: _after_images(values, rows.text, members) for name, values in of_text.items()},
        )
        kept = pruner.reduce(tokens)
        slots = places.gather(1, kept.indices.sort(dim=-1).values)
        keep[row, slots] = True
        source[row, slots] = places.gather(1, kept.indices)
        if pruner.merges:
            merged[row, slots] = kept.features
    columns = KeptColumns.closing_gaps(keep)
    left = rows.take(columns.of_tokens_at(source))
    # Merged tokens are in their slots already.
    return replace(left, hidden=columns.take(merged)) if pruner.merges else left


def _after_images(
    values: torch.Tensor, text: torch.Tensor, members: Sequence[tuple[int, int, torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    """What belongs to the text after each of some images, of ``values`` (B, T, ...); ``text`` (B, T) is where it is."""
    found, text = [], text.cpu()
    for row, _, places in members:
        after = text[row].clone()
        after[: places[-1]] = False
        found.append(values[row, after.nonzero().flatten().to(values.device, non_blocking=True)])
    return tuple(found)


def choose_raters(rows: Rows, pruner: Any) -> torch.Tensor:
    """The text tokens after each row's first image that a method takes as raters, which needs ``rater_attention``.

    Returns
    -------
    Tensor (B, T), bool
        Over the embedded prompts, before any drop.
    """
    chosen = torch.zeros_like(rows.valid)
    device = chosen.device
    for row, (images, prompt) in enumerate(zip(rows.image_id.cpu(), rows.prompt.cpu(), strict=True)):
        visual = images != TEXT
        text = (~visual & prompt & (visual.cumsum(0) > 0)).nonzero().flatten()
        if len(text):
            visual = visual.nonzero().flatten().to(device, non_blocking=True)
            text = text.to(device, non_blocking=True)
            chosen[row, text] = pruner.raters(rows.hidden[row, visual], rows.hidden[row, text])
    return chosen


def refuse_images_without_text(rows: Rows, pruner: Pruner) -> None:
    """Raise a `ValueError` if no text of the prompt follows an image, for methods that rank by the text's attention."""
    following = rows.text.flip(1).int().cumsum(dim=1).flip(1)
    if bool(((following == 0) & (rows.image_id != TEXT)).any()):
        raise ValueError(
            f"{type(pruner).__name__} ranks visual tokens by the attention of the text after them, but no text follows "
            "an image of the prompt"
        )


def _groups(
    image_id: torch.Tensor, images: Sequence[ImageTokens], alone: bool
) -> list[list[tuple[int, int, torch.Tensor]]]:
    """Groups of (row, image, places) with the same size and layout, then and now; `alone`: every image by itself.

    Places are on the host.
    """
    groups: dict[object, list[tuple[int, int, torch.Tensor]]] = {}
    for row, numbers in enumerate(image_id.cpu()):  # one look at the whole batch
        for image in numbers.unique().tolist():
            if image != TEXT:
                places = (numbers == image).nonzero().flatten()
                kind = (row, image) if alone else (len(images[image]), images[image].layout, len(places))
                groups.setdefault(kind, []).append((row, image, places))
    return list(groups.values())
