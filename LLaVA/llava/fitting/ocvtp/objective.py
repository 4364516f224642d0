"""A training step's question: how well do an image's slots say what its hidden tokens are?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava.fitting.ocvtp.loss import slot_weights, weighted_error
from llava.pruning.methods.ocvtp.config import SlotConfig
from llava.pruning.methods.ocvtp.decoder import RandomOrderDecoder
from llava.pruning.methods.ocvtp.network import SlotPruner
from llava.train.loop import seed_of


class Reconstruction(nn.Module):
    """The pruner and the decoder that it is trained with.

    Parameters
    ----------
    config : SlotConfig
        With a decoder.
    """

    def __init__(self, config: SlotConfig):
        super().__init__()
        self.pruner = SlotPruner(config)
        self.decoder = RandomOrderDecoder(config.width, config.slot_width, config.decoder)

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
        tokens = config.decoder.tokens
        noise = torch.randn(batch, slots, config.slot_width, generator=generator)
        order = torch.rand(batch, tokens, generator=generator).argsort(dim=-1)
        drawn = torch.randint(max(1, tokens - 1), (batch, 1), generator=generator)
        fixed = torch.full_like(drawn, min(config.decoder.context, max(0, tokens - 2)))
        shown = torch.where(torch.rand(batch, 1, generator=generator) < 0.5, drawn, fixed)
        return cls(noise, order, shown)

    def rows(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Some images' share of it."""
        return self.noise[rows], self.order[rows], self.shown[rows]


def seeded(*key: object) -> torch.Generator:
    """A generator that depends on nothing but the key."""
    return torch.Generator().manual_seed(seed_of(*key))
