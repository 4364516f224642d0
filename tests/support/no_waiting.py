"""Operations for whose result a GPU's host has to wait, made errors on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,  # .item(), .tolist() of one number, int(tensor), bool(tensor)
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.equal.default,
}


INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def makes_the_host_wait(operation, args: tuple) -> bool:
    """Whether an operation has a result whose value or size the host has to know."""
    by_mask = operation in INDEXING and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    return operation in WAITING or by_mask


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if makes_the_host_wait(operation, args):
            raise RuntimeError(f"on a GPU the host would wait for {operation}")
        return operation(*args, **(kwargs or {}))


def no_waiting(function: Callable, *arguments):
    """Call a function of which no operation may make the host wait."""
    with _NoWaiting():
        return function(*arguments)
