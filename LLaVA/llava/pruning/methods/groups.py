"""A budget that is divided among groups of tokens."""

from __future__ import annotations

import torch


def select_by_quota(
    order: torch.Tensor,
    group: torch.Tensor,
    quota: torch.Tensor,
    favour: torch.Tensor,
    k: int,
    last: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first tokens of every group up to its quota: (B, k), int64.

    What is left of the budget goes round, one a group.

    Parameters
    ----------
    order, group : Tensor (B, N), int64
        Every token once, the best first; and the group of each token, 0 to G - 1.
    quota : Tensor (B, G), integer
        Adds up to at most k, 1 <= k <= N.
    favour : Tensor (B, G)
        The groups with the largest come first in every round; ties go to the lowest group.
    last : Tensor (B, N), bool, optional
        Tokens that come after all others, whatever their group; in ``order`` they do already.
    """
    groups = quota.shape[1]
    turn = favour.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # (B, G)
    own = group.gather(1, order)  # (B, N)
    member = own.unsqueeze(-1) == torch.arange(groups, device=group.device)  # (B, N, G)
    rank = member.cumsum(dim=1).gather(-1, own.unsqueeze(-1)).squeeze(-1) - 1  # within its group
    rounds = (rank - quota.gather(1, own) + 1).clamp_min(0)
    place = torch.where(rounds > 0, rounds * groups + turn.gather(1, own), 0)
    if last is not None:
        place = place.masked_fill(last.gather(1, order), order.shape[1] * (groups + 1))
    return order.gather(1, place.argsort(dim=-1, stable=True)[:, :k])
