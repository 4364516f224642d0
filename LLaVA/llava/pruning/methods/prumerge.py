"""PruMerge: keep what [CLS] attends to, and merge into each kept token what its key resembles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.methods.importance import AttentionRanked, Importance, most_important
from llava.pruning.similarity import wide
from llava.pruning.tokens import KeptTokens, VisualTokens, gather_tokens

NEIGHBOURS = 32


def outlier_count(attention: torch.Tensor) -> int:
    """How many of an image's attention values (N,) lie above ``Q3 + 1.5 (Q3 - Q1)``.

    Source: PruMerge, arXiv 2403.15388.
    """
    quarters = torch.tensor([0.25, 0.75]).to(attention.device, non_blocking=True)
    lower, upper = attention.float().quantile(quarters)
    return int((attention > upper + 1.5 * (upper - lower)).sum())


def grid_step(n: int, outliers: int) -> int:
    """Spacing of PruMerge+'s adaptive grid over ``n`` tokens: a third of the mean spacing of the outliers.

    At least 1, where more than a sixth of the tokens are outliers.
    """
    return max(1, n // outliers // 3)


def evenly_spaced(taken: torch.Tensor, seen: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` evenly spaced ones of every image's tokens that are seen and not taken: (B, count), int64, distinct.

    Number ``floor((i + 1/2) c / count)`` of an image's c candidates, in raster order, for i = 0 .. count - 1. Where
    there are too few of them, tokens that are not seen follow, the lowest first; at most as many as are not taken.
    ``taken`` and ``seen`` are (B, N), bool.
    """
    if count == 0:
        return torch.empty(len(taken), 0, dtype=torch.int64, device=taken.device)
    candidates = seen & ~taken
    order = (candidates.int() - taken.int()).argsort(dim=-1, descending=True, stable=True)
    available = candidates.sum(dim=-1, keepdim=True).clamp_min(count)  # (B, 1)
    steps = torch.arange(count, device=taken.device)
    return order.gather(1, (2 * steps + 1) * available // (2 * count))


def merge_into(
    features: torch.Tensor,
    keys: torch.Tensor,
    attention: torch.Tensor,
    kept: torch.Tensor,
    neighbours: int = NEIGHBOURS,
) -> torch.Tensor:
    """Add to every kept token its neighbours, weighted by their attention, and append the sum of what was dropped.

    A kept token i becomes ``x_i + sum_j a_j x_j`` over the tokens j, kept or dropped, whose keys have the largest
    cosines with its own; the last token is ``sum_j a_j x_j`` over the dropped ones. The weights are not normalised.

    Parameters
    ----------
    features : Tensor (B, N, D), floating
        x: what is merged, into (B, m + 1, D) of the same dtype.
    keys : Tensor (B, N, C), floating
        Of the encoder's last layer. A token whose key is zero, as a newline's is, has no neighbours and is none.
    attention : Tensor (B, N), floating
        a: attention of [CLS] in that layer.
    kept : Tensor (B, m), int64
        0 <= m <= N.
    neighbours : int
        How many are merged into a kept token, or all others where there are not so many.

    Source: PruMerge, arXiv 2403.15388.
    """
    seen = keys.any(dim=-1)  # (B, N)
    places = kept.unsqueeze(-1)  # (B, m, 1)
    x = wide(features)
    attention = attention.to(x.dtype)
    unit = torch.nn.functional.normalize(keys.to(x.dtype), dim=-1)
    cosine = gather_tokens(unit, kept) @ unit.mT  # (B, m, N)
    cosine = cosine.masked_fill(~seen.unsqueeze(1), -2).scatter(-1, places, -math.inf)
    nearest = cosine.argsort(dim=-1, descending=True, stable=True)[..., : min(neighbours, x.shape[1] - 1)]
    pays = (attention * seen).unsqueeze(1).expand_as(cosine)
    weights = torch.zeros_like(cosine).scatter(-1, nearest, pays.gather(-1, nearest))
    weights = weights * seen.gather(1, kept).unsqueeze(-1)
    dropped = attention.scatter(1, kept, 0).unsqueeze(1)  # (B, 1, N)
    merged = torch.cat([weights, dropped], dim=1) @ x
    merged[:, :-1] += gather_tokens(x, kept)
    return merged.to(features.dtype)


@dataclass(frozen=True, kw_only=True)
class PruMerge(AttentionRanked):
    """The tokens with the most [CLS] attention, each with its neighbours merged in, and one token for all the others.

    The budget includes that last token, which stands at the place of the dropped token with the most attention. Tokens
    go on in descending order of attention, as in the published code. That code merges the encoder's features, before
    the projector; here, by our own choice, the projected tokens are merged, with the same neighbours and weights,
    because a pruner hands on projected tokens.

    Attributes
    ----------
    adaptive : bool
        The paper's own budget instead of a kept ratio: as many tokens as the image's attention has outliers above
        ``Q3 + 1.5 (Q3 - Q1)``, at least one, and the token for the others.
    """

    source: ClassVar[str] = "PruMerge, arXiv 2403.15388"
    venue: ClassVar[str] = "ICCV"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "two projections of the encoder, O(k N C)"

    importance: Importance = "auto"
    adaptive: bool = False

    @property
    def needs(self) -> frozenset[str]:
        own = "received_attention" if self.importance == "received" else "final_cls_attention"
        return frozenset({own, "final_keys"})

    def attention(self, tokens: VisualTokens) -> torch.Tensor:
        """As of every method that ranks by it, but that of [CLS] in the encoder's very last layer, as one wide head."""
        return super().attention(tokens) if self.importance == "received" else tokens.final_cls_attention

    @property
    def varies(self) -> bool:
        """Whether the number of tokens comes from the image."""
        return self.adaptive

    def check_budget(self, ratio: float | None, layer: int | None) -> None:
        if not self.adaptive:
            super().check_budget(ratio, layer)
        elif ratio is not None:
            raise ValueError(
                f"{type(self).__name__} with adaptive=True takes the number of tokens from every image: leave out the "
                f"kept ratio (SUBSET_RATIO), which is {ratio}, or set adaptive=False"
            )
        elif layer:
            raise ValueError(
                f"{type(self).__name__} with adaptive=True works before the decoder, where its tokens can be counted: "
                f"the layer (LAYER_INDEX) must be 0 or left out, not {layer}"
            )

    def schedule_for(self, ratio: float | None, layer: int | None, num_layers: int) -> tuple[tuple[int, float], ...]:
        """As for every method; the fraction of an adaptive run is the bound that is known beforehand, 1."""
        return super().schedule_for(1.0 if self.adaptive else ratio, layer, num_layers)

    def merge(self, tokens: VisualTokens) -> KeptTokens:
        features, keys, attention = tokens.features, tokens.final_keys, self.attention(tokens)
        if self.adaptive:
            kept = self._choose_adaptively(attention, keys.any(dim=-1))
        else:
            kept = self._choose(attention, keys.any(dim=-1), tokens.k - 1)
        merged = merge_into(features, keys, attention, kept)
        if kept.shape[1] == features.shape[1]:
            return KeptTokens(merged[:, :-1], kept)
        most_attended_of_the_dropped = attention.scatter(1, kept, -1).argmax(dim=-1, keepdim=True)
        return KeptTokens(merged, torch.cat([kept, most_attended_of_the_dropped], dim=1))

    def _choose(self, attention: torch.Tensor, seen: torch.Tensor, count: int) -> torch.Tensor:
        """``count`` tokens of every image, (B, count); ``seen`` (B, N) tells patches from newlines."""
        return most_important(attention)[:, :count]

    def _choose_adaptively(self, attention: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """As many tokens as one image's attention has outliers: (1, count)."""
        if len(attention) != 1:
            raise ValueError(
                f"{type(self).__name__} with adaptive=True keeps a number of its own of every image: give one image "
                f"at a time, not {len(attention)}"
            )
        return most_important(attention)[:, : _at_least_one_outlier(attention, seen)]


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge that keeps evenly spaced tokens beside the ones with the most attention.

    Beside the token for the others, half of the budget (the larger half of an odd number) is ranked by attention, and
    half is evenly spaced over the patches that are left. The published code spaces it over all patches, so that some
    go on twice.

    Attributes
    ----------
    adaptive : bool
        The paper's own budget instead of a kept ratio: the outliers, and every `grid_step`-th token that is none.
    """

    def _choose(self, attention: torch.Tensor, seen: torch.Tensor, count: int) -> torch.Tensor:
        ranked = super()._choose(attention, seen, (count + 1) // 2)
        taken = torch.zeros_like(seen).scatter(1, ranked, True)
        spaced = evenly_spaced(taken, seen, count - ranked.shape[1])
        return torch.cat([ranked, spaced], dim=1)

    def _choose_adaptively(self, attention: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        ranked = super()._choose_adaptively(attention, seen)
        grid = torch.zeros_like(seen)
        grid[:, :: grid_step(int(seen.sum()), ranked.shape[1])] = True
        spaced = (grid & seen).scatter(1, ranked, False)[0].nonzero().T
        return torch.cat([ranked, spaced], dim=1)


def _at_least_one_outlier(attention: torch.Tensor, seen: torch.Tensor) -> int:
    patches = attention[seen]
    return max(1, outlier_count(patches)) if len(patches) else 1
