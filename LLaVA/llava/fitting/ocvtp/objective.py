"""The training objective: how well an image's slots predict its hidden tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from llava.pruning.methods.ocvtp.network import SlotConfig, SlotPruner
from llava.train.loop import seed_of


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of the decoder that a pruner is trained with; a ValueError if its heads do not divide its width.

    Attributes
    ----------
    tokens : int
        Tokens of a training image, each with a position of its own.
    width, heads, layers, feed_forward : int
        The width is that of the features.
    context : int
        Tokens that are shown where their number is not drawn.
    """

    tokens: int
    width: int
    heads: int = 4
    layers: int = 4
    feed_forward: int = 4096
    context: int = 24

    @classmethod
    def of(cls, config: SlotConfig) -> DecoderConfig:
        """Those of a pruner that has a decoder."""
        assert config.decoder is not None
        return cls(**config.decoder)

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"the decoder's {self.heads} heads do not divide its width, {self.width}")


class RandomOrderDecoder(nn.Module):
    """Reconstructs an image's features from its slots and from the first few of its tokens in a random order.

    Source: OC-VTP, arXiv 2511.20439.
    """

    def __init__(self, slot_width: int, config: DecoderConfig):
        super().__init__()
        width = config.width
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, config.tokens, width)))
        self.token_projection = nn.Sequential(nn.Linear(width, width, bias=False), nn.LayerNorm(width))
        self.slot_projection = nn.Sequential(nn.Linear(slot_width, width, bias=False), nn.LayerNorm(width))
        self.norm = nn.LayerNorm(width, bias=False)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                config.heads,
                config.feed_forward,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
                bias=False,
            )
            for _ in range(config.layers)
        )
        # What `norm` gives is itself the residual stream.
        self.layers[0].norm1 = nn.Identity()

    def forward(
        self, features: torch.Tensor, slots: torch.Tensor, order: torch.Tensor, shown: torch.Tensor
    ) -> torch.Tensor:
        """Reconstruct features (B, N, C) from slots (B, S, D).

        ``order`` (B, N), int64, is a permutation of each image's tokens, of which the first ``shown`` (B, 1) are seen.
        """
        places = order.unsqueeze(-1).expand(-1, -1, self.positions.shape[-1])
        tokens = self.token_projection(features).gather(1, places)
        hidden = torch.arange(order.shape[1], device=order.device) >= shown  # (B, N)
        query = torch.where(hidden.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        query = self.norm(query + self.positions.expand(len(order), -1, -1).gather(1, places))
        memory = self.slot_projection(slots)
        for layer in self.layers:
            query = layer(query, memory)
        return torch.empty_like(query).scatter(1, places, query)


class Reconstruction(nn.Module):
    """The pruner and the decoder that it is trained with, whose sizes are ``config.decoder``."""

    def __init__(self, config: SlotConfig):
        super().__init__()
        self.pruner = SlotPruner(config)
        self.decoder = RandomOrderDecoder(config.slot_width, DecoderConfig.of(config))

    def forward(
        self, features: torch.Tensor, noise: torch.Tensor, order: torch.Tensor, shown: torch.Tensor
    ) -> torch.Tensor:
        """The area-weighted error of each image (B,), float32; see `RandomOrderDecoder` and `Draws`."""
        slots, attention = self.pruner(features, noise)
        reconstruction = self.decoder(features, slots, order, shown)
        return weighted_error(reconstruction, features, attention, slot_weights(attention.detach().float()))


@dataclass(frozen=True)
class Draws:
    """What is random about a batch.

    Attributes
    ----------
    noise : Tensor (B, S, D)
        Of the initial slots.
    order : Tensor (B, N), int64
        In which the tokens are read.
    shown : Tensor (B, 1), int64
        How many of them the decoder sees: for half of the images any number up to N - 2, for the others the context of
        the configuration.
    """

    noise: torch.Tensor
    order: torch.Tensor
    shown: torch.Tensor

    @classmethod
    def sample(cls, generator: torch.Generator, batch: int, slots: int, config: SlotConfig) -> Draws:
        """Draw for a batch."""
        decoder = DecoderConfig.of(config)
        tokens = decoder.tokens
        noise = torch.randn(batch, slots, config.slot_width, generator=generator)
        order = torch.rand(batch, tokens, generator=generator).argsort(dim=-1)
        drawn = torch.randint(max(1, tokens - 1), (batch, 1), generator=generator)
        fixed = torch.full_like(drawn, min(decoder.context, max(0, tokens - 2)))
        shown = torch.where(torch.rand(batch, 1, generator=generator) < 0.5, drawn, fixed)
        return cls(noise, order, shown)

    def rows(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Some images' share of it."""
        return self.noise[rows], self.order[rows], self.shown[rows]


def seeded(*key: object) -> torch.Generator:
    """A generator that depends on nothing but the key."""
    return torch.Generator().manual_seed(seed_of(*key))


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
        Largest weight (B, S) after that.
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
    """Mean squared error of each image (B,), float32, every token weighted by the slots that attend to it.

    ``attention`` (B, S, N) is the slots', and no gradient passes through it; ``weights`` (B, S) are theirs, as from
    `slot_weights`; features are (B, N, C). Source: OC-VTP, arXiv 2511.20439.
    """
    share = torch.einsum("bs,bsn->bn", weights.float(), attention.detach().float())
    error = (reconstruction.float() - features.float()).square().mean(dim=-1)  # (B, N)
    return (share * error).sum(dim=-1) / share.sum(dim=-1)
