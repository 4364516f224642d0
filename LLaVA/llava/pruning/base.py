"""The contract of a pruner, and every invariant of a selection, once."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


def kept_count(n: int, ratio: float) -> int:
    """Number of visual tokens that a kept ratio leaves of ``n``.

    ``max(1, int(round(ratio * n)))`` with Python's round (half to even), at most ``n``.
    """
    return min(n, max(1, round(ratio * n)))


def content_key(tensor: torch.Tensor) -> int:
    """A 63-bit digest of a tensor's values (read as float32), the same in every process and on every machine."""
    values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return int.from_bytes(hashlib.sha256(values.numpy().tobytes()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class VisualTokens:
    """What a pruner sees: a batch of images with the same number of visual tokens, and the budget.

    Attributes
    ----------
    features : Tensor (B, N, D), floating
        Projected visual tokens, raster order.
    k : int
        Budget: number of tokens to keep of each image.
    image_keys : tuple of int, or None
        One content digest an image, for methods that draw at random.
    last_attention : Tensor (B, H, N), float32, or None
        Attention, in the decoder layer before the drop, of the last prompt token to each visual token, a head each.
    """

    features: torch.Tensor
    k: int
    image_keys: tuple[int, ...] | None = None
    last_attention: torch.Tensor | None = None


@dataclass(frozen=True)
class KeptTokens:
    """What a pruner leaves.

    Attributes
    ----------
    features : Tensor (B, k, D)
        The tokens that go on, in the dtype of the input.
    indices : Tensor (B, k), int64
        Where they stood among the N.
    """

    features: torch.Tensor
    indices: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Pruner(ABC):
    """A selection method; the fields of a subclass are its options.

    A subclass is a frozen dataclass with one method, `select`. A method that merges tokens overrides `reduce`. The
    class attributes say what the method is and needs; the model computes what is in ``needs``, and only then.

    Attributes
    ----------
    stage : str
        Where the method works: "before the decoder" unless it says otherwise.
    needs : frozenset of str
        Fields of `VisualTokens`, beyond the features and the budget, that `select` reads.
    source : str
        Paper or definition.
    first_layer, default_layer : int
        The lowest decoder layer whose input the method can prune, and the one it prunes when none is named.
    """

    stage: ClassVar[str] = "before the decoder"
    needs: ClassVar[frozenset[str]] = frozenset()
    source: ClassVar[str] = ""
    first_layer: ClassVar[int] = 0
    default_layer: ClassVar[int] = 0

    @abstractmethod
    def select(self, tokens: VisualTokens) -> torch.Tensor:
        """Choose ``tokens.k`` of the N tokens of every image.

        Only called with 1 <= k < N and finite features. Each image's choice must not depend on the others, nor on
        anything but the options and the tokens; ties go to the lowest index.

        Returns
        -------
        Tensor (B, k), int64, on the features' device
            Distinct indices in any order.
        """

    @property
    def keeps_raster_order(self) -> bool:
        """Whether the kept tokens go on in raster order (else in the order that `select` returned)."""
        return True

    @torch.no_grad()
    def indices(self, tokens: VisualTokens) -> torch.Tensor:
        """Validated indices (B, k), int64: ascending, or in the method's own order where it says so.

        Raises
        ------
        ValueError
            If the features are not a floating (B, N, D) tensor with finite values, or the budget is below 1.
        RuntimeError
            If the method broke its contract.
        """
        features = tokens.features
        if features.ndim != 3 or not features.is_floating_point() or features.shape[1] == 0:
            raise ValueError(
                f"Visual tokens must be a floating (B, N, D) tensor with N >= 1, not {features.dtype} "
                f"{tuple(features.shape)}"
            )
        if tokens.k < 1:
            raise ValueError(f"At least one visual token must be kept, not k = {tokens.k}")
        if not torch.isfinite(features).all():
            raise ValueError("Visual tokens contain NaN or infinite values")
        missing = sorted(name for name in self.needs if getattr(tokens, name) is None)
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs {', '.join(missing)} beside the visual tokens, which only a model gives: "
                "use BASELINE or pruning(model, ...)"
            )

        batch, n, _ = features.shape
        if tokens.k >= n:
            return torch.arange(n, device=features.device).expand(batch, n)
        chosen = self.select(tokens)
        if chosen.shape != (batch, tokens.k) or chosen.dtype != torch.int64:
            raise RuntimeError(
                f"{type(self).__name__}.select returned {chosen.dtype} {tuple(chosen.shape)}, "
                f"not int64 {(batch, tokens.k)}"
            )
        ascending = chosen.sort(dim=-1).values
        if not (ascending.diff(dim=-1) > 0).all():
            raise RuntimeError(f"{type(self).__name__}.select chose a token twice")
        return ascending if self.keeps_raster_order else chosen

    def reduce(self, tokens: VisualTokens) -> KeptTokens:
        """Choose, and gather the chosen tokens; a method that merges tokens overrides this."""
        indices = self.indices(tokens)
        gathered = tokens.features.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.features.shape[-1]))
        return KeptTokens(gathered, indices)
