"""Checks of what only the device knows: at once, or where a server waits anyway."""

from __future__ import annotations

from contextvars import ContextVar, Token

import torch

Condition = tuple[torch.Tensor, Exception]
"""A bool of shape (), and what to raise where it is False."""


def require(*conditions: Condition) -> None:
    """Raise the first exception whose condition does not hold; inside `deferred_checks` only note them down.

    One look at all of them: on a GPU the host waits at each.
    """
    deferred = _deferred.get()
    if deferred is None:
        _raise_first(conditions)
    else:
        deferred.conditions += conditions


class deferred_checks:
    """A block in which pruning does not wait for the device to learn whether tokens and choices are valid.

        with deferred_checks() as checks:
            model(...)
        checks.verify()

    The conditions are computed and kept: a few bytes a batch, so take a new block for every batch. One captured in a
    CUDA graph is computed again by every replay, and `verify` then looks at the latest. Tokens that are not finite are
    pruned somehow until then.
    """

    def __init__(self):
        self.conditions: list[Condition] = []
        self._token: Token[deferred_checks | None] | None = None

    def __enter__(self) -> deferred_checks:
        self._token = _deferred.set(self)
        return self

    def __exit__(self, *error) -> None:
        assert self._token is not None
        _deferred.reset(self._token)

    def verify(self) -> None:
        """Wait for the device, and raise the first error that would have been raised inside the block.

        A ValueError for tokens, or something that a method ranks by, that are not finite; a RuntimeError if a method
        chose a token twice, or one that is not there.
        """
        _raise_first(self.conditions)


def _raise_first(conditions) -> None:
    if not conditions:
        return
    holds = torch.stack([condition for condition, _ in conditions]).tolist()
    for held, (_, error) in zip(holds, conditions, strict=True):
        if not held:
            raise error


_deferred: ContextVar[deferred_checks | None] = ContextVar("deferred", default=None)
