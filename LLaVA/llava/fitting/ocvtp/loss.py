"""What a pruner is trained to minimise: the reconstruction error, with every slot's part weighted by its size."""

from __future__ import annotations

from typing import Literal

import torch


def slot_weights(
    attention: torch.Tensor,
    power: float = 0.5,
    normalise: Literal["mean", "sum", "none"] = "mean",
    cap: float | None = 10.0,
) -> torch.Tensor:
    """How much a slot's tokens count: ``area^-power``, so that small slots are not lost in the background.

    A slot's area is the share of tokens that it attends to more than any other slot does. A slot without any such
    token has weight 0. The published code gives it 1e4, and then its faint attention rules the loss.

    Parameters
    ----------
    attention : Tensor (B, S, N)
        Slot attention, 1 in sum over the slots.
    power : float
    normalise : str
        "mean": the slots with an area have a mean weight of 1; "sum": their weights add up to their number; "none".
        The first two are the same but for rounding.
    cap : float or None
        Largest weight after that.

    Returns
    -------
    Tensor (B, S)
    """
    winners = attention.argmax(dim=1)  # (B, N)
    area = torch.nn.functional.one_hot(winners, attention.shape[1]).to(attention).mean(dim=1)  # (B, S)
    weights = torch.where(area > 0, area.clamp_min(1e-8) ** -power, 0)
    if normalise != "none":
        occupied = (area > 0).sum(dim=-1, keepdim=True)
        weights = weights * occupied / weights.sum(dim=-1, keepdim=True)
    return weights if cap is None else weights.clamp_max(cap)


def weighted_error(
    reconstruction: torch.Tensor, features: torch.Tensor, attention: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of each image, every token weighted by the slots that attend to it.

    Parameters
    ----------
    reconstruction, features : Tensor (B, N, C)
    attention : Tensor (B, S, N)
        Slot attention; no gradient passes through it.
    weights : Tensor (B, S)
        Of the slots, such as `slot_weights` gives.

    Returns
    -------
    Tensor (B,), float32

    Source: OC-VTP, arXiv 2511.20439.
    """
    share = torch.einsum("bs,bsn->bn", weights.float(), attention.detach().float())
    error = (reconstruction.float() - features.float()).square().mean(dim=-1)  # (B, N)
    return (share * error).sum(dim=-1) / share.sum(dim=-1)
