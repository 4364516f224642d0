"""The projector: from the vision tower's width to the language model's."""

from __future__ import annotations

import re

import torch
from torch import nn


class IdentityMap(nn.Module):
    """Hands its input on."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return x

    @property
    def config(self) -> dict[str, str]:
        return {"mm_projector_type": "identity"}


class SimpleResBlock(nn.Module):
    """Layer norm, then a residual two-layer MLP: (..., channels) -> (..., channels)."""

    def __init__(self, channels: int):
        super().__init__()
        self.pre_norm = nn.LayerNorm(channels)
        self.proj = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pre_norm(x)
        return x + self.proj(x)


def build_vision_projector(config, delay_load: bool = False, **kwargs) -> nn.Module:
    """Build the projector from ``config.mm_hidden_size`` to ``config.hidden_size``.

    ``config.mm_projector_type`` is "linear" (the default), "mlp<n>x_gelu" (n linear layers with GELU between them) or
    "identity"; a ValueError for any other.
    """
    projector_type = getattr(config, "mm_projector_type", "linear")
    if projector_type == "identity":
        return IdentityMap()
    if projector_type == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    mlp = re.fullmatch(r"mlp(\d+)x_gelu", projector_type)
    if mlp is None:
        raise ValueError(f"Unknown projector type: {projector_type}")
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(int(mlp[1]) - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
