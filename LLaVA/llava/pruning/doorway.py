"""The two public functions: select tokens from any features, and prune inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch

from llava.pruning.base import VisualTokens, content_key, kept_count
from llava.pruning.config import PruningConfig


def select(
    features: torch.Tensor,
    ratio: float | None = None,
    method: str = "otprune",
    *,
    k: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """Choose which of N tokens to keep; needs no LLaVA model.

    Parameters
    ----------
    features : Tensor (N, D) or (B, N, D), floating, any device
        The tokens, one row each.
    ratio : float, optional
        Kept ratio, 0 < ratio <= 1; 0.098, the published setting, when neither it nor ``k`` is given.
    method : str
        One of `available_methods`.
    k : int, optional
        Number of tokens to keep, instead of ``ratio``; k >= N keeps all.
    **options
        The method's own options.

    Returns
    -------
    Tensor (k,) or (B, k), int64, on the features' device
        Ascending (raster order), except where an option of the method says otherwise.

    Raises
    ------
    ValueError
        For features that are not a finite floating matrix, both ``ratio`` and ``k``, an unknown method or option, or a
        value out of range.
    """
    if ratio is not None and k is not None:
        raise ValueError(f"give either ratio or k, not both (ratio={ratio!r}, k={k!r})")
    if k is not None and (isinstance(k, bool) or not isinstance(k, Integral) or k < 1):
        raise ValueError(f"k must be a whole number >= 1, not {k!r}")
    if not isinstance(features, torch.Tensor) or features.ndim not in (2, 3):
        found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(f"features must be a tensor (N, D) or (B, N, D), not {found}")
    if ratio is None:
        ratio = 0.098 if k is None else 1.0
    config = PruningConfig(method=method, ratio=ratio, options=options)
    batch = features if features.ndim == 3 else features.unsqueeze(0)
    budget = kept_count(batch.shape[1], config.ratio) if k is None else int(k)
    pruner = config.build_pruner()
    keys = tuple(content_key(row) for row in batch) if "image_keys" in pruner.needs else None
    indices = pruner.indices(VisualTokens(batch, budget, image_keys=keys))
    return indices if features.ndim == 3 else indices[0]


@contextmanager
def pruning(
    model: Any, method: str, ratio: float | None = None, layer: int | None = None, **options: Any
) -> Iterator[Any]:
    """Prune with a method inside a ``with`` block, and restore what the model did before.

    Parameters
    ----------
    model
        A LLaVA model of this package.
    method, ratio, layer, **options
        As in `PruningConfig`.

    Raises
    ------
    ValueError
        For an unknown method or option, or a value out of range.
    """
    before = model.pruning
    model.set_pruning(PruningConfig(method=method, ratio=ratio, layer=layer, options=options))
    try:
        yield model
    finally:
        model.set_pruning(before)
