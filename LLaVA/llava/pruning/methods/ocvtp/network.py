"""The pruner network: features in, slots and what each of them attends to out; and its folder on the disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.pruning.methods.trained import CONFIG, WEIGHTS, filled, read_config, read_weights

MODEL_TYPE, KIND = "ocvtp", "an OC-VTP pruner"


@dataclass(frozen=True)
class SlotConfig:
    """A pruner network; the defaults are the published sizes for CLIP-L. A ValueError for a size below 1.

    Attributes
    ----------
    width, hidden, slot_width, feed_forward : int
        Of the vision encoder's features, of the projection before the slots, of a slot, and of the slots' feed-forward
        block.
    iterations : int
        Of slot attention.
    dropout : float
        In the slots' feed-forward block, in training.
    bi_level : bool
        Whether gradients reach the initial slots straight through all iterations but the last.
    layer : int or None
        Vision-encoder layer whose output is read, 0-based or from the end of the layers that run; None if not known.
    slots : int
        Number that the network was validated with; it runs with any.
    decoder : dict or None
        Sizes of the decoder that it was trained with (`llava.fitting.ocvtp.objective.DecoderConfig`).
    trained_on : dict
        Where the features came from, and how long the network was trained.
    """

    width: int = 1024
    hidden: int = 2048
    slot_width: int = 512
    feed_forward: int = 2048
    iterations: int = 3
    dropout: float = 0.01
    bi_level: bool = True
    layer: int | None = 8
    slots: int = 64
    decoder: dict[str, int] | None = None
    trained_on: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("width", "hidden", "slot_width", "feed_forward", "iterations", "slots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of a pruner must be a whole number >= 1, not {value!r}")

    @classmethod
    def load(cls, folder: Path) -> SlotConfig:
        """A folder's ``config.json``; an OSError if there is none, a ValueError if it describes something else."""
        values = read_config(folder, MODEL_TYPE, KIND)
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{folder / CONFIG} does not describe {KIND}: {error}") from error


class InitialSlots(nn.Module):
    """The normal distribution that all slots start from."""

    def __init__(self, width: int):
        super().__init__()
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, width)))
        self.logstd = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, width)))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Standard normal draws (B, S, D) -> slots (B, S, D)."""
        return self.mean + noise * self.logstd.exp()


class SlotAttention(nn.Module):
    """Slots compete for tokens, and each becomes a mean of what it won, several times over.

    Source: Locatello et al., "Object-centric learning with slot attention", NeurIPS 2020; the gradient is that of Jia
    et al., "Improving object-centric learning with query optimization", ICLR 2023.
    """

    def __init__(self, width: int, feed_forward: int, iterations: int, dropout: float, bi_level: bool):
        super().__init__()
        self.iterations, self.bi_level = iterations, bi_level
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_queries = nn.LayerNorm(width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward), nn.GELU(), nn.Dropout(dropout), nn.Linear(feed_forward, width)
        )

    def forward(
        self, tokens: torch.Tensor, slots: torch.Tensor, visible: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Divide tokens (B, N, D) among initial slots (B, S, D).

        Returns the slots, and the attention of the last iteration (B, S, N): how they share each token, 1 in sum over
        them (0 where it is not ``visible`` (B, N), bool).
        """
        tokens = self.norm_tokens(tokens)
        keys, values = self.key(tokens), self.value(tokens)
        initial = slots
        for iteration in range(self.iterations):
            if self.bi_level and iteration == self.iterations - 1:
                # The value stays; the gradient passes to the initial slots as if no iteration were between.
                slots = slots.detach() + initial - initial.detach()
            queries = self.query(self.norm_queries(slots))
            attention = (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(dim=1)  # (B, S, N)
            if visible is not None:
                attention = attention * visible.unsqueeze(1)
            updates = attention / (attention.sum(dim=-1, keepdim=True) + 1e-5) @ values  # (B, S, D)
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(updates)
            slots = slots + self.feed_forward(self.norm_feed_forward(slots))
        return slots, attention


class SlotPruner(nn.Module):
    """OC-VTP's pruner: a projection of the encoder's features, and slot attention on it.

    Source: OC-VTP, arXiv 2511.20439.
    """

    def __init__(self, config: SlotConfig):
        super().__init__()
        self.config = config
        self.project = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.hidden),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(config.hidden, config.slot_width),
        )
        self.initial = InitialSlots(config.slot_width)
        self.attention = SlotAttention(
            config.slot_width, config.feed_forward, config.iterations, config.dropout, config.bi_level
        )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "bias" in name:
                    parameter.zero_()

    def forward(
        self, features: torch.Tensor, noise: torch.Tensor, visible: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots (B, S, D) of images, and their attention (B, S, N).

        Features (B, N, C) are the output of the encoder layer that the network reads, without [CLS]; noise (B, S, D) or
        (1, S, D), standard normal draws, tells the slots apart; ``visible`` as in `SlotAttention`. A ValueError if the
        features have another width, or there are more slots than tokens.
        """
        if features.shape[-1] != self.config.width:
            raise ValueError(f"the pruner reads features of width {self.config.width}, not {features.shape[-1]}")
        if noise.shape[1] > features.shape[1]:
            raise ValueError(f"{noise.shape[1]} slots are more than the {features.shape[1]} tokens they would share")
        slots = self.initial(noise).expand(len(features), -1, -1)
        return self.attention(self.project(features), slots, visible)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SlotPruner:
        """The float32 network in a folder of training, in eval mode.

        An OSError if a file is missing or unreadable, a ValueError if the weights are not those of the configuration.
        """
        folder = Path(folder)
        return cls.from_weights(SlotConfig.load(folder), read_weights(folder, KIND), str(folder / WEIGHTS))

    @classmethod
    def from_weights(cls, config: SlotConfig, weights: dict[str, torch.Tensor], source: str) -> SlotPruner:
        """A float32 network with given weights, in eval mode; ``source`` is what an error names."""
        return filled(cls(config), weights, source)


def slot_noise(seed: int, slots: int, width: int) -> torch.Tensor:
    """The draw that tells ``slots`` slots apart: (1, slots, width), the same for every image and on every device."""
    return torch.randn(1, slots, width, generator=torch.Generator().manual_seed(seed))
