"""HoloV: a budget for every strip of the image, by attention and by how varied the strip is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.methods.groups import select_by_quota
from llava.pruning.methods.importance import AttentionRanked, Importance, most_important
from llava.pruning.tokens import VisualTokens


def strip_table(n: int, strips: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Consecutive strips of ``n`` tokens, the first ones a token longer where they cannot be equal.

    Returns
    -------
    members : Tensor (strips, L), int64
        The tokens of every strip; one of the next strip, or the last token, stands where a strip has no more.
    valid : Tensor (strips, L), bool
    strip : Tensor (n,), int64
        The strip of every token.
    """
    sizes = n // strips + (torch.arange(strips) < n % strips).long()
    ends = sizes.cumsum(0)
    place = torch.arange(-(-n // strips))
    members = (ends - sizes).unsqueeze(-1) + place
    strip = torch.searchsorted(ends, torch.arange(n), right=True)
    return members.clamp_max(n - 1), place < sizes.unsqueeze(-1), strip


def variety(features: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Variance of a token's cosines to the others of its strip, (B, S, L), float32; 0 for a token alone.

    Features are (B, S, L, D), of which ``valid`` (S, L), bool, are there.
    """
    unit = torch.nn.functional.normalize(features, dim=-1)
    cosine = unit @ unit.mT  # (B, S, L, L)
    others = valid.unsqueeze(-1) & valid.unsqueeze(-2) & ~torch.eye(valid.shape[1], device=valid.device).bool()
    count = others.sum(dim=-1).clamp_min(1)  # (S, L)
    mean = (cosine * others).sum(dim=-1) / count
    return ((cosine - mean.unsqueeze(-1)).square() * others).sum(dim=-1) / count


@dataclass(frozen=True, kw_only=True)
class HoloV(AttentionRanked):
    """Consecutive strips share the budget by their mean score, and keep their tokens of the largest score.

    A token's score is its attention plus ``diversity`` times the variance of its cosines within the strip, scaled so
    that both have the same mean there. Whole shares are rounded down, and the rest goes to the strips of the largest
    means. The published code ranks inside a strip by the attention alone, and counts the token itself as one of
    cosine 0; the paper does neither. Newline tokens go on only where the budget exceeds the patches.

    Attributes
    ----------
    strips : int
        How many, at least 1.
    diversity : float
        Weight of the scaled variance, >= 0.
    """

    source: ClassVar[str] = "HoloV, arXiv 2510.02912"
    venue: ClassVar[str] = "NeurIPS"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "one attention row of the encoder, O(N^2 D / s) for s strips"

    importance: Importance = "auto"
    strips: int = 16
    diversity: float = 0.09

    def __post_init__(self):
        if self.strips < 1:
            raise ValueError(f"HoloV's strips must be at least 1, not {self.strips}")
        if not 0 <= self.diversity < float("inf"):
            raise ValueError(f"HoloV's diversity must be a finite number >= 0, not {self.diversity}")

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        attention = self.attention(tokens)  # (B, N)
        batch, n = attention.shape
        table = strip_table(n, min(self.strips, n))
        members, valid, strip = (part.to(attention.device, non_blocking=True) for part in table)
        sizes = valid.sum(dim=-1)
        salience = attention[:, members] * valid  # (B, S, L)
        spread = variety(tokens.features.float()[:, members], valid)
        level, reach = salience.sum(dim=-1) / sizes, spread.sum(dim=-1) / sizes  # (B, S)
        scale = torch.where(reach > 0, level / reach, 0).unsqueeze(-1)
        score = salience + self.diversity * scale * spread

        favour = score.sum(dim=-1) / sizes  # (B, S)
        total = favour.sum(dim=-1, keepdim=True)
        share = torch.where(total > 0, favour / total, 1 / len(sizes))
        quota = (share * tokens.k).floor().long()
        score = score[:, strip, torch.arange(n, device=strip.device) - members[strip, 0]]
        newlines = attention == 0
        order = most_important(score.masked_fill(newlines, -1))
        return select_by_quota(order, strip.expand(batch, -1), quota, favour, tokens.k, last=newlines)
