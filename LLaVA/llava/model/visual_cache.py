"""Images that are never encoded twice: what is kept of each, remembered by its content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from llava.pruning.base import content_key

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def content_digests(images: Sequence[torch.Tensor]) -> list[Hashable]:
    """A digest of each image's values, computed where they lie: on a GPU the host waits once for all of them.

    On a CPU it is `content_key`; on a GPU two sums of the values' bits with random weights, modulo 2^64. Images that
    differ agree in both once in 2^60 times or less, and nobody chooses images that do: for telling pictures apart, not
    for signing them.

    Parameters
    ----------
    images : sequence of Tensor, floating
        Shape, dtype and device are not part of a digest, and one of a GPU is none of a CPU.
    """
    if any(image.device.type == "cpu" for image in images):
        return [content_key(image) for image in images]
    return [tuple(sums) for sums in torch.stack([_weighted_sums(image) for image in images]).tolist()] if images else []


def _weighted_sums(image: torch.Tensor) -> torch.Tensor:
    """(2,), int64."""
    bits = image.detach().contiguous().view(_INTEGERS[image.element_size()]).flatten()
    return (_weights(len(bits), image.device) * bits).sum(dim=1)  # what overflows is dropped


@lru_cache(maxsize=16)  # one a shape: crops differ in number
def _weights(n: int, device: torch.device) -> torch.Tensor:
    drawn = torch.empty(2, n, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(n))
    return (2 * drawn + 1).to(device, non_blocking=True)


@dataclass(frozen=True)
class Span:
    """What stands in an image's place in a prompt.

    Attributes
    ----------
    features : Tensor (k, D)
    indices : Tensor (k,), int64
        Where each stood among the image's tokens.
    total : int
        How many tokens the image has.
    """

    features: torch.Tensor
    indices: torch.Tensor
    total: int

    @classmethod
    def whole(cls, features: torch.Tensor) -> Span:
        """An image (N, D) of which nothing was dropped."""
        return cls(features, torch.arange(len(features), device=features.device), len(features))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.features.nbytes + self.indices.nbytes


class VisualCache:
    """Spans by key, the least recently used out when they take too many bytes.

    Benchmarks ask many questions about one picture (GQA about 31, POPE 18), and methods that do not look at the
    question keep the same tokens for all of them. A pruned image of LLaVA-1.5-7B takes half a megabyte.

    Parameters
    ----------
    max_bytes : int
        What is larger is not remembered.

    Attributes
    ----------
    hits, misses : int
        Images that were there, and that had to be encoded.
    nbytes : int
        What is remembered now.

    Raises
    ------
    ValueError
        If ``max_bytes`` is negative.
    """

    def __init__(self, max_bytes: int):
        if max_bytes < 0:
            raise ValueError(f"a cache of visual tokens cannot hold {max_bytes} bytes")
        self.max_bytes = max_bytes
        self.hits = self.misses = self.nbytes = 0
        self._spans: OrderedDict[Hashable, Span] = OrderedDict()

    def __len__(self) -> int:
        return len(self._spans)

    def get(self, key: Hashable) -> Span | None:
        """What is remembered under a key; counts a hit or a miss."""
        span = self._spans.get(key)
        if span is None:
            self.misses += 1
            return None
        self.hits += 1
        self._spans.move_to_end(key)
        return span

    def put(self, key: Hashable, span: Span) -> None:
        """Remember a span, and forget the least recently used ones where there is no room."""
        self._forget(key)
        if span.nbytes > self.max_bytes:
            return
        # A row of a batch would keep the whole batch alive.
        span = Span(span.features.detach().clone(), span.indices.clone(), span.total)
        self._spans[key] = span
        self.nbytes += span.nbytes
        while self.nbytes > self.max_bytes:
            self._forget(next(iter(self._spans)))

    def clear(self) -> None:
        """Forget everything, for instance after the weights have changed; the counts stay."""
        self._spans.clear()
        self.nbytes = 0

    def _forget(self, key: Hashable) -> None:
        span = self._spans.pop(key, None)
        if span is not None:
            self.nbytes -= span.nbytes
