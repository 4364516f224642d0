"""Rotary positions of three axes (time, row, column), as Qwen-VL has them, where images lose tokens.

Text is numbered as if nothing was dropped: an image takes ``max(rows, columns)`` of the line whatever is kept of it. So
a prefix that comes from the cache leaves no position to correct. Which tokens an image keeps is known only when it is
encoded; each kept embedding carries its row and column in four further columns (`to_columns`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

COLUMNS = 4
"""Row and column of a token, each as two digits."""
_BASE = 256
"""Whole numbers below it are exact in bfloat16, the dtype of the embeddings that the digits travel with."""


def to_columns(rows: int, columns: int) -> torch.Tensor:
    """The further columns of an image's embeddings: float32 (rows * columns, 4)."""
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    return torch.stack([row // _BASE, row % _BASE, column // _BASE, column % _BASE], dim=1).float()


def prompt_positions(length: int, images: Sequence[tuple[int, int, int, int]]) -> tuple[torch.Tensor, int]:
    """Positions of a prompt before its images are encoded.

    Parameters
    ----------
    length : int
        Tokens of the prompt.
    images : sequence of (offset, kept, rows, columns)
        Where each image's placeholders begin and how many there are, and its grid; ascending.

    Returns
    -------
    positions : Tensor (3, length), int64
        Exact for the text; an image's kept tokens have their image's first position.
    delta : int
        Position of the first generated token, less ``length``.
    """
    steps = torch.ones(length, dtype=torch.int64)
    for offset, kept, rows, columns in images:
        steps[offset : offset + kept] = 0
        steps[offset + kept - 1] = max(rows, columns)
    ends = steps.cumsum(0)
    return (ends - steps).expand(3, -1).clone(), int(ends[-1]) - length


def split(embeddings: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Embeddings (n_i, D + COLUMNS) without the further columns, and the (time, row, column) of each: int64 (3, n)."""
    digits = torch.cat([one[:, -COLUMNS:] for one in embeddings]).long()
    rows, columns = digits[:, 0] * _BASE + digits[:, 1], digits[:, 2] * _BASE + digits[:, 3]
    return [one[:, :-COLUMNS] for one in embeddings], torch.stack([torch.zeros_like(rows), rows, columns])


def place(
    positions: torch.Tensor, is_image: torch.Tensor, is_start: torch.Tensor, offsets: torch.Tensor, computed: int
) -> torch.Tensor:
    """Put the kept tokens of one step's images at their rows and columns.

    Parameters
    ----------
    positions : Tensor (3, length), int64
        Of the whole prompt, as `prompt_positions` numbered it.
    is_image : Tensor (length,), bool
        Which tokens are placeholders of images.
    is_start : Tensor (length,), bool
        The token before each image.
    offsets : Tensor (3, n), int64
        As `split` returns them, of the step's images or parts of them, in order.
    computed : int
        Tokens of the prompt that earlier steps have computed.

    Returns
    -------
    Tensor (3, length)
    """
    own = is_image.nonzero().flatten()
    own = own[own >= computed][: offsets.shape[1]]
    starts = is_start.nonzero().flatten()
    first = positions[:, starts[torch.searchsorted(starts, own) - 1]] + 1
    placed = positions.clone()
    placed[:, own] = first + offsets
    return placed
