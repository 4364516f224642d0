"""How much memory tensors take at the same time."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that are made inside the block and not dropped yet.

    Attributes
    ----------
    now, peak : int
        In bytes.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        for tensor in filter(_is_tensor, tree_leaves(found)):
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place in self._holders:
                self._holders[place] += 1
            elif place in given or not place:
                continue
            else:
                self._holders[place] = 1
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
            weakref.finalize(tensor, self._drop, place, storage.nbytes())
        return found

    def _drop(self, place: int, nbytes: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            del self._holders[place]
            self.now -= nbytes


def _is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)
