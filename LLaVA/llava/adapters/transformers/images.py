"""Which tokens of a batch of prompts are which image's, and what is known of each image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from llava.adapters.transformers.encoder import Signals, of_tokens
from llava.adapters.transformers.family import Entries, Family, Inputs, Model
from llava.pruning.base import Pruner
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


class Grid(NamedTuple):
    """Neighbouring tokens of one entry of an encoder's output, from one place among all tokens to another."""

    begin: int
    end: int
    entry: int
    tokens: TokenGrid | None


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
    listed : bool
        Whether the model reads a list of features, not a tensor.
    """

    entries: Sequence[torch.Tensor]
    layouts: Sequence[Layout | None]
    keys: Sequence[int] | None
    signals: Mapping[str, Sequence[torch.Tensor]]
    listed: bool

    @classmethod
    def of(cls, base: Model, family: Family, pruner: Pruner, output: Any, inputs: Inputs, patches: Signals) -> Encoding:
        """Describe an output of ``get_image_features``, whose ``pooler_output`` becomes a list.

        ``patches`` are the encoder's signals.
        """
        listed = not isinstance(output.pooler_output, torch.Tensor)
        output.pooler_output = entries = list(output.pooler_output)  # in a list they keep their identity
        flat = [entry.reshape(-1, entry.shape[-1]) for entry in entries]
        layouts = family.layouts(base, flat, inputs) if family.layouts else [None] * len(flat)
        signals = of_tokens(base, family, flat, inputs, patches)
        if pruner.drop_duplicates:
            signals["patch_ids"] = _patch_ids(base, flat, layouts, inputs)
        keys = [content_key(own) for own in _pixels(inputs, len(flat))] if "image_keys" in pruner.needs else None
        return cls(entries, layouts, keys, signals, listed)

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
        edges = [0, *accumulate(entry.numel() // entry.shape[-1] for entry in output.pooler_output)]
        borders = torch.zeros(len(places) + 1, dtype=torch.bool)
        borders[[0, -1]] = True
        borders[1:-1] = places[1:, 0] != places[:-1, 0]
        if family.image == "entry":
            borders[edges] = True
        else:
            borders[1:-1] |= places[1:, 1] != places[:-1, 1] + 1
        signals = {name: torch.cat([own[index] for index in order]) for name, own in self.signals.items()}
        grids = list(self._grids(order, edges))
        images = []
        for begin, end in pairwise(borders.nonzero().flatten().tolist()):
            own = [grid for grid in grids if grid.begin < end and begin < grid.end]
            layout = tuple(grid.tokens for grid in own if grid.tokens is not None)
            tokens = ImageTokens(
                features[begin:end],
                layout if sum(map(len, layout)) == end - begin else None,
                {name: values[begin:end] for name, values in signals.items()},
            )
            if self.keys is not None:
                # Of each entry that it is made of, whole or in part, the key and where the part begins.
                starts = {one.entry: max(begin - edges[one.entry], 0) for one in own}
                parts = tuple((self.keys[order[entry]], start) for entry, start in starts.items())
                whole = len(parts) == 1 and parts[0][1] == 0
                tokens.signals["image_keys"] = parts[0][0] if whole else hash(parts) & (2**63 - 1)
            images.append(PromptImage(int(places[begin, 0]), places[begin:end, 1], tokens))
        return images

    def _grids(self, order: Sequence[int], edges: Sequence[int]) -> Iterator[Grid]:
        """Of entries in an ``order``, with ``edges`` among the tokens; one a whole entry where no layout is known."""
        for entry, (index, (begin, end)) in enumerate(zip(order, pairwise(edges), strict=True)):
            layout = self.layouts[index]
            if layout is None or sum(map(len, layout)) != end - begin:
                yield Grid(begin, end, entry, None)
                continue
            for grid in layout:
                yield Grid(begin, begin + len(grid), entry, grid)
                begin += len(grid)


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
    # Of a prompt without an image, Idefics3 has an entry without tokens.
    rows = [_token_pixels(pixels, tokens, layout, side) for pixels, tokens, layout in own if tokens]
    return list(patch_ids(torch.cat(rows)).split(lengths))


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
        own = [image[: int(image.flatten(1).any(1).sum())] for image in own]
        if len(own) != entries:  # before transformers 5.21 each of Idefics3's tiles was an entry
            own = [tile for image in own for tile in image]
    return own
