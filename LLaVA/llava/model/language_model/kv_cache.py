"""The KV cache: its name in this transformers, and what it was filled from, which its keys and values do not tell."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import LlamaModel
from transformers.cache_utils import Cache

from llava.pruning.rows import CACHE_NAMES


def _name_in(parameters: Mapping[str, Any]) -> str:
    name = next((name for name in CACHE_NAMES if name in parameters), None)
    if name is None:
        raise ImportError(f"this transformers calls the KV cache neither {' nor '.join(CACHE_NAMES)}: use an older one")
    return name


CACHE = _name_in(inspect.signature(LlamaModel.forward).parameters)
"""What the installed transformers calls it, in arguments of forward passes and masks and in outputs."""


def cache_among(past_key_values: Cache | None, others: dict[str, Any]) -> Cache | None:
    """The cache of a call, whatever name it came under; taken out of the other keyword arguments.

    A TypeError if one came under a name that is not known, since decoding without it would give other tokens; a
    ValueError if it came under both names.
    """
    cache = others.pop("cache", None)
    if cache is not None and past_key_values is not None:
        raise ValueError("give the KV cache as `cache` or as `past_key_values`, not as both")
    unknown = [name for name, value in others.items() if isinstance(value, Cache)]
    if unknown:
        raise TypeError(f"`{unknown[0]}` is a KV cache under an unknown name: allowed are {' and '.join(CACHE_NAMES)}")
    return past_key_values if cache is None else cache


@dataclass(frozen=True)
class Filling:
    """What a cache was filled from: whoever goes on with it needs no more than the new tokens.

    Attributes
    ----------
    length : int
        How many tokens entered the decoder, padding included.
    cached : int
        How many of them the first layer holds: fewer where tokens were dropped at its input.
    mask : Tensor (B, length), bool, or None
        False at padding; None where there is none.
    following : Tensor (B or 1, 1), int64
        Rotary position of each row's next token.
    left : mapping of int to Tensor (B, T'), bool
        Layer at whose input tokens were dropped -> what its cache and the deeper ones hold, False at padding; on the
        device of that layer.
    compact : bool
        Whether what was kept there has rotary positions without gaps.
    """

    length: int
    cached: int
    mask: torch.Tensor | None
    following: torch.Tensor
    left: Mapping[int, torch.Tensor] = field(default_factory=dict)
    compact: bool = False

    @classmethod
    def of(cls, cache: Cache | None, device: torch.device) -> Filling:
        """What the decoder noted at ``cache.filling``, and what came since; of an empty cache, or none, nothing."""
        cached = 0 if cache is None else int(cache.get_seq_length())
        noted = getattr(cache, "filling", None)
        if noted is None or not cached:
            return cls(cached, cached, None, torch.full((1, 1), cached, device=device))
        return noted.grown(cached - noted.cached)

    def grown(self, n: int, new: torch.Tensor | None = None, positions: torch.Tensor | None = None) -> Filling:
        """With ``n`` more tokens; a negative ``n`` undoes that, for a cache that was cropped.

        Parameters
        ----------
        new : Tensor (B, n), bool, optional
            False at padding; None where there is none.
        positions : Tensor (B or 1, n), int64, optional
            Their rotary positions; by default they go on without a gap.
        """
        if n == 0:
            return self
        if positions is None:
            following = self.following + (n if new is None else new.sum(dim=1, keepdim=True))
        else:
            last = positions if new is None else positions.masked_fill(~new, -1)
            following = torch.maximum(self.following, last.amax(dim=1, keepdim=True) + 1)
        mask = self.mask
        if mask is None and new is not None:
            mask = new.new_ones(len(new), self.length)

        def longer(mask: torch.Tensor) -> torch.Tensor:
            if n < 0:
                return mask[:, :n]
            return torch.cat([mask, mask.new_ones(len(mask), n) if new is None else new.to(mask.device)], dim=1)

        return replace(
            self,
            length=self.length + n,
            cached=self.cached + n,
            mask=None if mask is None else longer(mask),
            following=following,
            left={layer: longer(mask) for layer, mask in self.left.items()},
        )

    def new_content(self, mask: torch.Tensor | None, n: int) -> torch.Tensor | None:
        """Which of ``n`` new tokens a caller's mask covers: (B, n), bool; None for no mask, or one of another kind.

        It may be (B, T) and cover them alone, or what came before as well, as a prompt's ids or as embedded: of that
        the cache knows better. Or (B, 1, n, cache's length), as transformers prepares it for a static cache: added to
        the attention, or True where it looks. A ValueError if it covers fewer tokens than came.
        """
        if not isinstance(mask, torch.Tensor):
            return None
        if mask.ndim == 4:
            looked_at = mask[:, 0, -1, self.cached : self.cached + n]  # by the last of them
            return looked_at if looked_at.dtype == torch.bool else looked_at == 0
        if mask.shape[1] < n:
            raise ValueError(f"attention_mask covers {mask.shape[1]} tokens, but {n} came")
        return mask[:, -n:].bool()

    def new_positions(self, n: int, new: torch.Tensor | None) -> torch.Tensor:
        """Rotary positions (B or 1, n) of ``n`` tokens that go on without a gap; ``new`` is False at padding."""
        if new is None:
            return self.following + torch.arange(n, device=self.following.device)
        return self.following + (new.long().cumsum(dim=1) - 1).clamp_min(0)
