"""From a method's choice to the tokens that are left: every invariant of a selection, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from llava.pruning.checks import require
from llava.pruning.own_budget import count_of, distinct
from llava.pruning.schedule import apportion
from llava.pruning.signals import SIGNALS
from llava.pruning.tokens import ImageTokens, KeptTokens, VisualTokens, gather_tokens

if TYPE_CHECKING:
    from llava.pruning.base import Pruner


def reduce_images(pruner: Pruner | None, images: Sequence[ImageTokens], fraction: float) -> list[KeptTokens]:
    """Drop visual tokens of each image: features (N_i, D) -> (k_i, D), and where they stood; none without a method.

    Images with the same number of tokens, budget and layout are reduced in one batch; each image's choice is its own.
    """
    if pruner is None:
        return [KeptTokens.all_of(image.features) for image in images]
    alone = pruner.varies or pruner.drop_duplicates
    groups: dict[Any, list[int]] = {}
    for number, image in enumerate(images):
        kind = count_of(pruner, image.features, fraction), number if alone else (len(image), image.layout)
        groups.setdefault(kind, []).append(number)
    kept: dict[int, KeptTokens] = {}
    for (k, _), members in groups.items():
        left = reduce(pruner, VisualTokens.of([images[i] for i in members], k))
        for number, features, indices in zip(members, left.features, left.indices, strict=True):
            kept[number] = KeptTokens(features, indices)
    return [kept[number] for number in range(len(images))]


def reduce(pruner: Pruner, tokens: VisualTokens) -> KeptTokens:
    """What a method leaves of every image, validated; differentiable in the features, the choice being constant.

    Raises
    ------
    ValueError
        If the features are not a floating (B, N, D) tensor with finite values, the budget is below 1, or a signal that
        the method needs is missing.
    RuntimeError
        If the method broke its contract.
    """
    _check_input(pruner, tokens)
    if pruner.drop_duplicates:
        return _reduce_distinct(pruner, tokens)
    return _reduce(pruner, tokens)


def _reduce(pruner: Pruner, tokens: VisualTokens) -> KeptTokens:
    if tokens.k >= tokens.features.shape[1] and not pruner.varies:
        return KeptTokens.all_of(tokens.features)
    if pruner.per_crop and tokens.crops is not None:
        kept = [_reduce_per_crop(pruner, tokens, image, crops) for image, crops in enumerate(tokens.crops)]
        return KeptTokens(torch.cat([one.features for one in kept]), torch.cat([one.indices for one in kept]))
    return _merge_checked(pruner, tokens)


def _reduce_distinct(pruner: Pruner, tokens: VisualTokens) -> KeptTokens:
    """Of one image the tokens of distinct patches are there to be chosen, and no more than these can be kept."""
    if len(tokens.features) != 1:
        raise ValueError("drop_duplicates keeps a number of its own of every image: give one image at a time")
    places = distinct(tokens.patch_ids[0])
    if len(places) == tokens.features.shape[1]:
        return _reduce(pruner, tokens)
    kept = _reduce(pruner, tokens.at(0, places, min(tokens.k, len(places))))
    return KeptTokens(kept.features, places[kept.indices])


def chosen(pruner: Pruner, tokens: VisualTokens) -> KeptTokens:
    """What a method selects of every image; gradients flow through the tokens, and not through the choice."""
    with torch.no_grad():
        indices = pruner.select(tokens)
    if pruner.keeps_raster_order:
        indices = indices.sort(dim=-1).values
    return KeptTokens(gather_tokens(tokens.features, indices), indices)


def _reduce_per_crop(pruner: Pruner, tokens: VisualTokens, image: int, crops: torch.Tensor) -> KeptTokens:
    """One image, each of whose ``crops`` (N,) gets its share of the budget."""
    numbers = crops.unique().tolist()
    places = [(crops == number).nonzero().flatten() for number in numbers]
    grids = None if tokens.layout is None else [crop for part in tokens.layout for crop in part.split()]
    whole = tokens.at(image, torch.arange(len(crops), device=crops.device), tokens.k, tokens.layout)
    features, indices = [], []
    for number, own, k in zip(numbers, places, apportion(tokens.k, [len(own) for own in places]), strict=True):
        if k == 0:
            continue
        part = tokens.at(image, own, k, None if grids is None else (grids[number],))
        part = dataclasses.replace(part, whole=whole)
        everything = k >= len(own) and not pruner.varies
        kept = KeptTokens.all_of(part.features) if everything else _merge_checked(pruner, part)
        features.append(kept.features)
        indices.append(own[kept.indices])
    kept = KeptTokens(torch.cat(features, 1), torch.cat(indices, 1))
    if pruner.merges or not pruner.keeps_raster_order:
        return kept
    # A crop's tokens are not neighbours in the sequence.
    order = kept.indices.argsort(dim=-1)
    return KeptTokens(gather_tokens(kept.features, order), kept.indices.gather(1, order))


def _merge_checked(pruner: Pruner, tokens: VisualTokens) -> KeptTokens:
    batch, n, width = tokens.features.shape
    with torch.autocast(tokens.features.device.type, enabled=False):
        kept = pruner.merge(tokens) if pruner.merges else chosen(pruner, tokens)
    k = kept.indices.shape[-1] if pruner.varies else tokens.k
    name = type(pruner).__name__
    if kept.indices.shape != (batch, k) or kept.indices.dtype != torch.int64:
        raise RuntimeError(
            f"{name} returned {kept.indices.dtype} {tuple(kept.indices.shape)} indices, not int64 {(batch, k)}"
        )
    if kept.features.shape != (batch, k, width) or kept.features.dtype != tokens.features.dtype:
        raise RuntimeError(
            f"{name} returned {kept.features.dtype} {tuple(kept.features.shape)} tokens, "
            f"not {tokens.features.dtype} {(batch, k, width)}"
        )
    if not k:
        return kept
    ascending = kept.indices.sort(dim=-1).values
    require(
        ((ascending.diff(dim=-1) > 0).all(), RuntimeError(f"{name} chose a token twice")),
        (
            (ascending[:, 0].min() >= 0) & (ascending[:, -1].max() < n),
            RuntimeError(f"{name} chose a token that is not there"),
        ),
    )
    return kept


def _check_input(pruner: Pruner, tokens: VisualTokens) -> None:
    features, name = tokens.features, type(pruner).__name__
    if features.ndim != 3 or not features.is_floating_point() or 0 in features.shape:
        raise ValueError(
            f"Visual tokens must be a floating (B, N, D) tensor with B, N, D >= 1, not {features.dtype} "
            f"{tuple(features.shape)}"
        )
    if tokens.k < 1:
        raise ValueError(f"At least one visual token must be kept, not k = {tokens.k}")
    unknown = sorted(pruner.needs - SIGNALS.keys())
    if unknown:
        raise ValueError(f"{name} needs {', '.join(unknown)}, which is no signal; there are {', '.join(SIGNALS)}")
    needs = pruner.needs | ({"patch_ids"} if pruner.drop_duplicates else set())
    signals = {need: getattr(tokens, need) for need in sorted(needs)}
    missing = [need for need, values in signals.items() if values is None]
    if missing:
        raise ValueError(
            f"{name} needs {', '.join(missing)} beside the visual tokens, which only a model gives: use BASELINE or "
            "pruning(model, ...)"
        )
    conditions = [(torch.isfinite(features).all(), ValueError("Visual tokens contain NaN or infinite values"))]
    for need, values in signals.items():
        if isinstance(values, torch.Tensor):
            error = ValueError(f"{need}, which {name} ranks by, contains NaN or infinite values")
            conditions.append((torch.isfinite(values).all(), error))
    require(*conditions)
