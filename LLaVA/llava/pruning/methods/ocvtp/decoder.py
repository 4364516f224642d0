"""The decoder of the training: slots must tell it what the tokens are that it does not see."""

from __future__ import annotations

import torch
from torch import nn

from llava.pruning.methods.ocvtp.config import DecoderConfig


class RandomOrderDecoder(nn.Module):
    """Reconstructs an image's features from its slots and from the first few of its tokens in a random order.

    Source: OC-VTP, arXiv 2511.20439.

    Parameters
    ----------
    width : int
        Of the features.
    slot_width : int
    config : DecoderConfig
    """

    def __init__(self, width: int, slot_width: int, config: DecoderConfig):
        super().__init__()
        inner = config.width
        self.mask_token = nn.Parameter(torch.randn(1, 1, inner) * inner**-0.5)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, config.tokens, inner)))
        self.token_projection = nn.Sequential(nn.Linear(width, inner, bias=False), nn.LayerNorm(inner))
        self.slot_projection = nn.Sequential(nn.Linear(slot_width, inner, bias=False), nn.LayerNorm(inner))
        self.norm = nn.LayerNorm(inner, bias=False)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                inner,
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
        self.readout = nn.Identity() if inner == width else nn.Linear(inner, width)

    def forward(
        self, features: torch.Tensor, slots: torch.Tensor, order: torch.Tensor, shown: torch.Tensor
    ) -> torch.Tensor:
        """Reconstruct.

        Parameters
        ----------
        features : Tensor (B, N, C)
        slots : Tensor (B, S, D)
        order : Tensor (B, N), int64
            A permutation of the tokens of each image.
        shown : Tensor (B, 1), int64
            How many tokens are seen, the first ones in that order.

        Returns
        -------
        Tensor (B, N, C)
        """
        places = order.unsqueeze(-1).expand(-1, -1, self.positions.shape[-1])
        tokens = self.token_projection(features).gather(1, places)
        hidden = torch.arange(order.shape[1], device=order.device) >= shown  # (B, N)
        query = torch.where(hidden.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        query = self.norm(query + self.positions.expand(len(order), -1, -1).gather(1, places))
        memory = self.slot_projection(slots)
        for layer in self.layers:
            query = layer(query, memory)
        return self.readout(torch.empty_like(query).scatter(1, places, query))
