"""How much is kept of an image where that depends on the image: its effective rank, and patches that occur twice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llava.pruning.base import Pruner

NO_PATCH = 0
"""In ``patch_ids``, what is no patch of the image: a newline, [CLS]."""


def effective_rank(features: torch.Tensor) -> float:
    """How many directions tokens (N, D) spread over: exp of the entropy of their singular values, divided by the sum.

    1 for tokens that are multiples of one another (and for zeros), min(N, D) for orthogonal tokens of equal length.

    Source: Roy and Vetterli, EUSIPCO 2007; of an image's visual tokens: AgilePruner, ICLR 2026, arXiv 2603.01236.
    """
    # A Gram matrix has the singular values squared: float32 would lose the small ones, and Apple GPUs have no float64.
    device = "cpu" if features.device.type == "mps" else features.device
    x = features.detach().to(device).double().nan_to_num(0.0, 0.0, 0.0)  # `reduce` refuses what is not finite
    gram = x @ x.mT if len(x) <= x.shape[1] else x.mT @ x
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return math.exp(float(torch.special.entr(shares).sum()))


def count_of(pruner: Pruner, features: torch.Tensor, fraction: float) -> int:
    """How many of an image's tokens (N, D) a method keeps where the kept ratio is ``fraction``.

    With an effective rank as budget, ``fraction * rank / reference_rank`` of them, at most all: the mean over images is
    ``fraction`` if the reference is their mean rank.
    """
    if pruner.budget == "effective_rank":
        assert pruner.reference_rank is not None  # `check_own_budget`'s
        fraction = min(1.0, fraction * effective_rank(features) / pruner.reference_rank)
    return pruner.kept_count(len(features), fraction)


def check_own_budget(pruner: Pruner, ratio: float | None, before: bool) -> None:
    """Refuse options by which images keep numbers of their own where a method cannot have them, with a `ValueError`.

    ``before`` says whether it drops before the decoder alone.
    """
    rank, reference = pruner.budget == "effective_rank", pruner.reference_rank
    if reference is not None and not (math.isfinite(reference) and reference >= 1):
        raise ValueError(f"reference_rank must be a number >= 1, not {reference}")
    if rank and reference is None:
        raise ValueError(
            "budget=effective_rank needs reference_rank, the mean effective rank of the images that the kept ratio is "
            "to hold for (llava rank measures it)"
        )
    if reference is not None and not rank:
        raise ValueError(f"reference_rank={reference:g} goes with budget=effective_rank")
    chosen = [name for name, on in (("budget=effective_rank", rank), ("drop_duplicates", pruner.drop_duplicates)) if on]
    if chosen and not before:
        raise ValueError(f"{chosen[0]} is for methods that drop before the decoder (LAYER_INDEX=0)")
    if rank and ratio is None:
        raise ValueError("budget=effective_rank divides a kept ratio among images, and these options take none")


def patch_rows(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """The pixels of every square patch of images, in raster order: (B, 3, H, W) -> (B, P, 3 * side * side).

    What is left over at the right and below belongs to no patch.
    """
    cells = pixels.unfold(2, side, side).unfold(3, side, side)  # (B, 3, rows, columns, side, side)
    return cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def patch_ids(rows: torch.Tensor) -> torch.Tensor:
    """A number above `NO_PATCH` for each patch, the same where all pixels are: (..., P, values) -> int64 (..., P)."""
    numbers = rows.flatten(0, -2).unique(dim=0, return_inverse=True)[1]
    return numbers.reshape(rows.shape[:-1]) + NO_PATCH + 1


def distinct(ids: torch.Tensor) -> torch.Tensor:
    """Where each patch id (N,) stands first, and every token without a patch: ascending places, int64."""
    order = torch.arange(len(ids), device=ids.device)
    _, number = ids.unique(return_inverse=True)
    first = torch.full_like(order, len(ids)).scatter_reduce(0, number, order, "amin")
    return ((order == first[number]) | (ids == NO_PATCH)).nonzero().flatten()
