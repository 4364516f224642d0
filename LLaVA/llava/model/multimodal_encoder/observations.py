"""What pruning methods want to know about the vision encoder, taken from the one layer that has it.

Attention maps are computed here, from a layer's own projections and for the queries that are asked for; the encoder
itself runs on its fast kernels, in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from llava.pruning.base import Pruner
from llava.pruning.signals import ENCODER_SIGNALS, SIGNALS
from llava.pruning.similarity import products

Layer = Any
"""A CLIPEncoderLayer; what a module of transformers has, no type checker knows."""


def _split(projected: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, C) -> (B, H, T, C / H)."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def cls_attention(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """Attention of [CLS] to each patch in a CLIP layer with input (B, 1 + P, C), [CLS] first: (B, P, H), float32.

    Rows of the softmax over [CLS] and patches, without [CLS]'s own column.
    """
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    query = _split(attention.q_proj(normed[:, :1]), attention.num_heads)
    keys = _split(attention.k_proj(normed), attention.num_heads)
    rows = (products(query, keys) * attention.scale).softmax(dim=-1)  # (B, H, 1, 1 + P)
    return rows[:, :, 0, 1:].transpose(1, 2)


def received_attention(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """How much attention each patch gets in a CLIP layer, averaged over heads and queries: (B, P), float32."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    queries = _split(attention.q_proj(normed), attention.num_heads)
    keys = _split(attention.k_proj(normed), attention.num_heads)
    # An image at a time: only one image's maps, (H, 1 + P, 1 + P), are ever there.
    maps = ((products(*pair) * attention.scale).softmax(dim=-1) for pair in zip(queries, keys, strict=True))
    return torch.stack([each.mean(dim=(0, 1))[1:] for each in maps])


def cls_affinity(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """How alike the values of each patch and of [CLS] are in a CLIP layer: (B, P), float32.

    Per head the softmax, over [CLS] and patches, of the products of their values; averaged over the heads.
    """
    attention = layer.self_attn
    values = _split(attention.v_proj(layer.layer_norm1(hidden)), attention.num_heads)
    return products(values[:, :, :1], values).softmax(dim=-1).mean(dim=1)[:, 0, 1:]


def value_norms(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """L1 norm of each patch's value in a CLIP layer, averaged over the heads before: (B, P), float32."""
    attention = layer.self_attn
    values = _split(attention.v_proj(layer.layer_norm1(hidden)), attention.num_heads)
    return values.float().mean(dim=1).abs().sum(dim=-1)[:, 1:]


def mean_keys(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """Each patch's key in a CLIP layer, averaged over the heads: (B, P, C / H), float32."""
    attention = layer.self_attn
    return _split(attention.k_proj(layer.layer_norm1(hidden)), attention.num_heads).float().mean(dim=1)[:, 1:]


def wide_head(layer: Layer, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A CLIP layer's keys (B, P, C), and [CLS]'s attention (B, P), float32, if all heads were one."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    query, keys = attention.q_proj(normed[:, :1]), attention.k_proj(normed)
    rows = products(query, keys) * keys.shape[-1] ** -0.5
    return keys[:, 1:], rows.softmax(dim=-1)[:, 0, 1:]


Output = tuple[str, int | None]
"""A need of a pruner (one of `ENCODER_SIGNALS`), and the layer that it is taken from where that is a choice:
0-based, or from the end of the layers that run."""

FEATURES: Output = ("features", None)
"""What the tower is there for, beside what pruners ask of it."""


def encoder_outputs(pruner: Pruner | None) -> dict[str, tuple[Output, ...]]:
    """What a pruner asks of the vision encoder: each need with the outputs that it consists of."""
    if pruner is None:
        return {}
    found: dict[str, tuple[Output, ...]] = {}
    for need in sorted(pruner.needs & ENCODER_SIGNALS):
        layers: tuple[int | None, ...] = (None,)
        if SIGNALS[need].per_layer:
            layers = tuple(pruner.encoder_layers)
        elif need == "layer_features":
            layers = (pruner.feature_layer,)
        found[need] = tuple((need, layer) for layer in layers)
    if "text_similarity" in pruner.needs:
        found["encoder_features"] = (("encoder_features", None),)
    return found


class EncoderObserver:
    """Watches an encoder run and records what pruners need.

    Parameters
    ----------
    wanted : iterable of Output
    depth : int
        Layers that run.

    Attributes
    ----------
    outputs : dict of Output to Tensor (B, P, ...)
        Complete after `finish`.

    Raises
    ------
    ValueError
        If a layer is not among those that run.
    """

    def __init__(self, wanted: Iterable[Output], depth: int):
        self._wanted: dict[Output, list[Output]] = {}
        for need, layer in wanted:
            if layer is not None and not -depth <= layer < depth:
                raise ValueError(
                    f"the pruning method asks for layer {layer} of the vision encoder, of which {depth} layers run"
                )
            place = None if layer is None else layer % depth
            self._wanted.setdefault((need, place), []).append((need, layer))
        self._depth = depth
        self.outputs: dict[Output, torch.Tensor] = {}

    def before_layer(self, number: int, layer: Layer, hidden: torch.Tensor) -> None:
        """Look at a layer and its input (B, 1 + P, C)."""
        self._note(("received_attention", number), lambda: received_attention(layer, hidden))
        self._note(("layer_cls_attention", number), lambda: cls_attention(layer, hidden).mean(dim=-1))
        self._note(("cls_affinity", number), lambda: cls_affinity(layer, hidden))
        self._note(("value_norms", number), lambda: value_norms(layer, hidden))
        self._note(("layer_features", number - 1), lambda: hidden[:, 1:])
        if number == self._depth - 1:
            self._note(("cls_attention", None), lambda: cls_attention(layer, hidden))
            self._note(("encoder_keys", None), lambda: mean_keys(layer, hidden))

    def finish(self, last: Layer, hidden: torch.Tensor) -> None:
        """Look at the output (B, 1 + P, C) of the last layer that ran, and at the layer that would come next."""
        self._note(("encoder_features", None), lambda: hidden[:, 1:])
        self._note(("layer_features", self._depth - 1), lambda: hidden[:, 1:])
        if {("final_keys", None), ("final_cls_attention", None)} & self._wanted.keys():
            keys, attention = wide_head(last, hidden)
            self._note(("final_keys", None), lambda: keys)
            self._note(("final_cls_attention", None), lambda: attention)

    def _note(self, found: Output, compute: Callable[[], torch.Tensor]) -> None:
        if names := self._wanted.get(found):
            self.outputs |= dict.fromkeys(names, compute())
