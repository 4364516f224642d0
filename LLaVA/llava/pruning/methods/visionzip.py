"""VisionZip: keep the patches of the most attention, and merge the others into a few contextual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.methods.importance import AttentionRanked, Importance, most_important
from llava.pruning.similarity import wide
from llava.pruning.tokens import KeptTokens, VisualTokens, gather_tokens


def patch_counts(attention: torch.Tensor) -> list[int]:
    """How many of each image's tokens (B, N) are patches: those with any attention, since a softmax gives all some.

    The layout would tell as well, but it is not known of a crop alone, nor inside the decoder.
    """
    return (attention > 0).sum(dim=-1).tolist()


def contextual_tokens(
    hidden: torch.Tensor, metric: torch.Tensor, rest: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge what is not dominant in an image into evenly spaced targets: tokens (count, D), and places of the targets.

    Targets are ``count`` evenly spaced places of ``rest``. Every other one joins the target whose metric has the
    largest cosine with its own. A contextual token is the target *plus* the mean of those that joined it, as in the
    published code: about twice as long as the tokens around it, where anything joined.

    Parameters
    ----------
    hidden, metric : Tensor (N, D) and (N, c), floating
        What is merged, and what likeness is measured on.
    rest : Tensor (R,), int64
        Ascending places of the tokens that are not dominant.
    count : int
        1 <= count <= R.

    Source: VisionZip, CVPR 2025.
    """
    step = len(rest) // count
    targets = rest[::step][:count]
    unit = torch.nn.functional.normalize(metric[rest].float(), dim=-1)
    cosine = unit @ unit[::step][:count].T  # (R, count)
    joins = cosine.argmax(dim=-1, keepdim=True) == torch.arange(count, device=rest.device)
    # A target stays where it is, also where another one is its duplicate.
    joins[: count * step : step] = False
    x = wide(hidden)
    sums = joins.T.to(x.dtype) @ x[rest]
    means = sums / joins.sum(dim=0).clamp_min(1).unsqueeze(-1)
    return (x[targets] + means).to(hidden.dtype), targets


@dataclass(frozen=True, kw_only=True)
class VisionZip(AttentionRanked):
    """Dominant tokens by the encoder's attention, and contextual ones merged from the rest by the likeness of keys.

    The published code merges the encoder's features, before the projector, and keeps [CLS] among the dominant tokens.
    Here the projected tokens are merged, with the same assignment, because a pruner hands on projected tokens; and
    [CLS] is left out, because the projector never saw one in training. Its place in the budget goes to one more patch.
    Newline tokens are neither dominant nor merged; they go on only where the budget exceeds the patches.

    The dominant tokens go on first, in raster order, then the contextual ones, each at the place of its target.

    Attributes
    ----------
    contextual_share : float
        Part of the budget that contextual tokens take, 0 to 1: 10 of 64, 20 of 128 and 30 of 192 in the paper.
    """

    source: ClassVar[str] = "VisionZip, arXiv 2412.04467"
    venue: ClassVar[str] = "CVPR"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "one attention row of the encoder, O(N c C) for c merged tokens"
    licence: ClassVar[str] = "Apache-2.0"

    importance: Importance = "auto"
    contextual_share: float = 10 / 64

    def __post_init__(self):
        if not 0 <= self.contextual_share <= 1:
            raise ValueError(f"VisionZip's contextual_share must be a number from 0 to 1, not {self.contextual_share}")

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"encoder_keys"}

    def merge(self, tokens: VisualTokens) -> KeptTokens:
        contextual = round(self.contextual_share * tokens.k)
        dominant = tokens.k - contextual
        attention = self.attention(tokens)
        order = most_important(attention)
        kept = order[:, :dominant].sort(dim=-1).values
        features = gather_tokens(tokens.features, kept)
        if contextual == 0:
            return KeptTokens(features, kept)
        parts, places = [], []
        patches = patch_counts(attention)
        for image, ranked in enumerate(order):
            rest = ranked[dominant : max(patches[image], tokens.k)].sort().values
            merged, targets = contextual_tokens(tokens.features[image], tokens.encoder_keys[image], rest, contextual)
            parts.append(torch.cat([features[image], merged]))
            places.append(torch.cat([kept[image], targets]))
        return KeptTokens(torch.stack(parts), torch.stack(places))
