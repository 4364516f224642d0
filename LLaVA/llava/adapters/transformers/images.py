"""Which tokens of a batch of prompts are which image's, and what is known of each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from llava.adapters.transformers.encoder import Signals
from llava.adapters.transformers.family import Entries, Family, Inputs, Model
from llava.pruning.own_budget import patch_ids, patch_rows
from llava.pruning.signals import content_key
from llava.pruning.tokens import ImageTokens, Layout, TokenGrid


@dataclass(frozen=True)
class PromptImage:
    """One image of a batch of prompts.

    Attributes
    ----------
    row : int
    columns : Tensor (N,), int64, on the host
        Where its placeholders stand.
    tokens : ImageTokens
    """

    row: int
    columns: torch.Tensor
    tokens: ImageTokens


@dataclass(frozen=True)
class Encoding:
    """What is known of an encoder's output when it is made, and is gone when the prompts are read.

    Attributes
    ----------
    entries : sequence of Tensor (N_i, D)
        The encoder's ``pooler_output``. ``generate`` repeats entries for beams: they are told apart by identity.
    layouts : sequence of tuple of TokenGrid or None
        Of each entry.
    keys : sequence of int, or None
        Digest of each entry's pixels.
    signals : dict of name -> sequence of Tensor (N_i, ...)
        The signals that a pruner needs of the vision encoder, for the tokens of each entry.
    """

    entries: Sequence[torch.Tensor]
    layouts: Sequence[Layout | None]
    keys: Sequence[int] | None
    signals: Mapping[str, Sequence[torch.Tensor]]

    @classmethod
    def of(
        cls, base: Model, family: Family, output: Any, inputs: Inputs, patches: Signals, keys: bool, ids: bool
    ) -> Encoding:
        """Describe an output of ``get_image_features``, whose ``pooler_output`` is a list.

        ``patches`` are the encoder's signals; ``keys`` says whether images have to be told apart by their pixels, and
        ``ids`` whether patches have.
        """
        entries = output.pooler_output
        flat = [entry.reshape(-1, entry.shape[-1]) for entry in entries]
        layouts = family.layouts(base, flat, inputs) if family.layouts else [None] * len(flat)
        to_tokens: Any = family.to_tokens  # there are signals only where it is known
        signals = {name: to_tokens(base, calls, flat, inputs) for name, calls in patches.items()}
        digests = [content_key(own) for own in _pixels(inputs, len(flat))] if keys else None
        told_apart = {"patch_ids": _patch_ids(base, flat, layouts, inputs)} if ids else {}
        return cls(entries, layouts, digests, by_field(signals) | told_apart)

    def images(self, output: Any, marks: torch.Tensor, family: Family) -> list[PromptImage]:
        """The images of the prompts, row by row.

        Parameters
        ----------
        output
            The encoder's output, possibly repeated since `of` saw it.
        marks : Tensor (B, T), bool, on the host
            Where placeholders stand.

        Raises
        ------
        ValueError
            If placeholders and features differ in number.
        """
        number = {id(entry): index for index, entry in enumerate(self.entries)}
        order = [number[id(entry)] for entry in output.pooler_output]
        features = torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in output.pooler_output])
        places = marks.nonzero()  # (M, 2): row by row, as the features come
        if len(places) != len(features):
            raise ValueError(
                f"the prompts have {len(places)} image tokens and the images {len(features)}: the processor that made "
                "the prompts must be this model's"
            )
        lengths = [entry.numel() // entry.shape[-1] for entry in output.pooler_output]
        edges = [0, *accumulate(lengths)]
        borders = torch.zeros(len(places) + 1, dtype=torch.bool)
        borders[[0, -1]] = True
        borders[1:-1] = places[1:, 0] != places[:-1, 0]
        if family.image == "entry":
            borders[edges] = True
        else:
            borders[1:-1] |= places[1:, 1] != places[:-1, 1] + 1
        signals = {name: torch.cat([own[index] for index in order]) for name, own in self.signals.items()}
        layout_of = _layout_by_span([self.layouts[index] for index in order], lengths)
        return [
            PromptImage(
                int(places[begin, 0]),
                places[begin:end, 1],
                ImageTokens(
                    features[begin:end],
                    layout_of(begin, end),
                    {name: values[begin:end] for name, values in signals.items()} | self._key(begin, end, order, edges),
                ),
            )
            for begin, end in pairwise(borders.nonzero().flatten().tolist())
        ]

    def _key(self, begin: int, end: int, order: Sequence[int], edges: Sequence[int]) -> dict[str, int]:
        """The signal ``image_keys`` of the tokens from ``begin`` to ``end``: which parts of which entries they are."""
        if self.keys is None:
            return {}
        parts = [
            (self.keys[order[entry]], max(low, begin) - low)
            for entry, (low, high) in enumerate(pairwise(edges))
            if max(low, begin) < min(high, end)
        ]
        whole = len(parts) == 1 and parts[0][1] == 0
        return {"image_keys": parts[0][0] if whole else hash(tuple(parts)) & (2**63 - 1)}


def by_field(signals: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """Signals by their name in `llava.pruning.signals.Signals`: those of several layers side by side."""
    fields = {name: values for name, values in signals.items() if " " not in name}
    if "final_cls_attention" in fields:
        fields["final_cls_attention"] = [values[:, 0] for values in fields["final_cls_attention"]]
    of_layers: dict[str, list[list[torch.Tensor]]] = {}
    for name in sorted(signals.keys() - fields.keys(), key=lambda name: int(name.rpartition(" ")[2])):
        of_layers.setdefault(name.partition(" ")[0], []).append(signals[name])
    for name, layers in of_layers.items():
        fields[name] = [torch.cat(columns, dim=-1) for columns in zip(*layers, strict=True)]
    return fields


def _layout_by_span(layouts: Sequence[Layout | None], lengths: Sequence[int]) -> Callable[[int, int], Layout | None]:
    """Feature maps of the tokens from one place to another, which may be several entries or a part of one."""
    starts: dict[int, TokenGrid | None] = {}
    place = 0
    for layout, length in zip(layouts, lengths, strict=True):
        if layout is not None and sum(map(len, layout)) == length:
            for part, offset in zip(layout, accumulate(map(len, layout), initial=0), strict=False):
                starts[place + offset] = part
        else:
            starts[place] = None
        place += length

    def layout_of(begin: int, end: int) -> Layout | None:
        parts = [part for start, part in starts.items() if begin <= start < end]
        known = tuple(part for part in parts if part is not None)
        return known if len(known) == len(parts) and sum(map(len, known)) == end - begin else None

    return layout_of


def tiles(base: Model, inputs: Inputs, entries: int) -> list[list[torch.Tensor]]:
    """The pixels that each entry of an encoder's output was made of, as tiles (3, H, W).

    Parameters
    ----------
    base : model
    inputs : mapping
        Arguments of ``get_image_features``.
    entries : int
        How many there are.
    """
    own = _pixels(inputs, entries)
    if inputs.get("image_grid_thw") is not None:
        vision = base.config.vision_config
        return [
            [_unpatched(pixels, grid, vision.spatial_merge_size, vision.temporal_patch_size)]
            for pixels, grid in zip(own, inputs["image_grid_thw"].tolist(), strict=True)
        ]
    return [list(pixels) if pixels.ndim == 4 else [pixels] for pixels in own]


def _unpatched(pixels: torch.Tensor, grid: Sequence[int], merge: int, frames: int) -> torch.Tensor:
    """Qwen and GLM: an image (3, H, W) from its patches (N, 3 * frames * P * P), in squares of merged ones."""
    _, rows, columns = grid
    side = round((pixels.shape[1] / (3 * frames)) ** 0.5)
    first = pixels.view(-1, rows // merge, columns // merge, merge, merge, 3, frames, side, side)[0, ..., 0, :, :]
    return first.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * side, columns * side)


def _patch_ids(base: Model, entries: Entries, layouts: Sequence[Layout | None], inputs: Inputs) -> list[torch.Tensor]:
    """The signal ``patch_ids`` of the tokens of each entry, comparable between entries."""
    lengths, size = [len(entry) for entry in entries], base.config.vision_config.patch_size
    side = size if isinstance(size, int) else size[0]
    own = zip(tiles(base, inputs, len(entries)), lengths, layouts, strict=True)
    return list(patch_ids(torch.cat([_token_pixels(*one, side) for one in own])).split(lengths))


def _token_pixels(pixels: Sequence[torch.Tensor], tokens: int, layout: Layout | None, side: int) -> torch.Tensor:
    """The pixels (N, values) of each token of an entry that has such tiles: a token covers a square of patches."""
    patches, rows = pixels[0].shape[-2] // side, layout[0].rows if layout else 1
    if patches % rows == 0:
        found = patch_rows(torch.stack(list(pixels)), side * (patches // rows)).flatten(0, 1)
        if len(found) == tokens:
            return found
    raise ValueError("drop_duplicates: the tokens of this image are no plain grid over its pixels")


def _pixels(inputs: Inputs, entries: int) -> list[torch.Tensor]:
    """The pixels of each entry, without what pads them to the others' size."""
    pixels, grid, sizes = inputs["pixel_values"], inputs.get("image_grid_thw"), inputs.get("image_sizes")
    if grid is not None:
        return list(pixels.split(grid.prod(-1).tolist()))
    own = list(pixels)
    if len(own) != entries:
        # Prompts without an image have pixels of padding, but no entry.
        own = [image for image in own if image.any()]
    if own[0].ndim == 3 and sizes is not None:
        return [image[:, :height, :width] for image, (height, width) in zip(own, sizes.tolist(), strict=True)]
    if own[0].ndim == 4:  # crops, padded with crops of zeros
        return [image[: int(image.flatten(1).any(1).sum())] for image in own]
    return own
