"""What pruning methods want to know about the vision encoder, taken from the one layer that has it.

Attention maps are computed here, from a layer's own projections and for the queries that are asked for; the encoder
itself runs on its fast kernels, in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from llava.pruning.base import products


def _split(projected: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, C) -> (B, H, T, C / H)."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def cls_attention(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Attention of [CLS] to each patch in a CLIP layer.

    Parameters
    ----------
    layer : CLIPEncoderLayer
    hidden : Tensor (B, 1 + P, C)
        The layer's input, [CLS] first.

    Returns
    -------
    Tensor (B, P, H), float32
        Rows of the softmax over [CLS] and patches, without [CLS]'s own column.
    """
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    query = _split(attention.q_proj(normed[:, :1]), attention.num_heads)
    keys = _split(attention.k_proj(normed), attention.num_heads)
    rows = (products(query, keys) * attention.scale).softmax(dim=-1)  # (B, H, 1, 1 + P)
    return rows[:, :, 0, 1:].transpose(1, 2)


def received_attention(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """How much attention each patch gets in a CLIP layer, averaged over heads and over all queries.

    Returns
    -------
    Tensor (B, P), float32
    """
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    queries = _split(attention.q_proj(normed), attention.num_heads)
    keys = _split(attention.k_proj(normed), attention.num_heads)
    # An image at a time: only one image's maps, (H, 1 + P, 1 + P), are ever there.
    maps = ((products(*pair) * attention.scale).softmax(dim=-1) for pair in zip(queries, keys, strict=True))
    return torch.stack([each.mean(dim=(0, 1))[1:] for each in maps])


def mean_keys(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Each patch's key in a CLIP layer, averaged over the heads: (B, P, C / H), float32."""
    attention = layer.self_attn
    return _split(attention.k_proj(layer.layer_norm1(hidden)), attention.num_heads).float().mean(dim=1)[:, 1:]


def wide_head(layer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A CLIP layer's keys (B, P, C), and [CLS]'s attention (B, P), float32, if all heads were one."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    query, keys = attention.q_proj(normed[:, :1]), attention.k_proj(normed)
    rows = products(query, keys) * keys.shape[-1] ** -0.5
    return keys[:, 1:], rows.softmax(dim=-1)[:, 0, 1:]


class EncoderObserver:
    """Watches an encoder run and notes down what a pruner needs.

    Parameters
    ----------
    needs : frozenset of str
        Among `llava.pruning.base.ENCODER_NEEDS`.
    layers : sequence of int
        Those of ``received_attention``: 0-based, or from the end of the layers that run.
    feature_layer : int or None
        That of ``layer_features``, counted in the same way.

    Attributes
    ----------
    notes : dict of str to Tensor (B, P, ...)
        Complete after `finish`.
    """

    def __init__(self, needs: frozenset[str], layers: Sequence[int] = (), feature_layer: int | None = None):
        self.needs, self.layers, self.feature_layer = needs, tuple(layers), feature_layer
        self.notes: dict[str, torch.Tensor] = {}
        self._received: dict[int, torch.Tensor] = {}

    def check(self, depth: int) -> None:
        """Raise a ValueError when a layer is not among the ``depth`` that run."""
        for layer in (*self.layers, *(() if self.feature_layer is None else (self.feature_layer,))):
            if not -depth <= layer < depth:
                raise ValueError(
                    f"the pruning method asks for layer {layer} of the vision encoder, of which {depth} layers run"
                )

    def before_layer(self, number: int, depth: int, layer: nn.Module, hidden: torch.Tensor) -> None:
        """Look at layer ``number`` of ``depth`` and its input (B, 1 + P, C)."""
        for wanted in self.layers:
            if wanted % depth == number and number not in self._received:
                self._received[number] = received_attention(layer, hidden)
        if self.feature_layer is not None and self.feature_layer % depth == number - 1:
            self.notes["layer_features"] = hidden[:, 1:]
        if number != depth - 1:
            return
        if "cls_attention" in self.needs:
            self.notes["cls_attention"] = cls_attention(layer, hidden)
        if "encoder_keys" in self.needs:
            self.notes["encoder_keys"] = mean_keys(layer, hidden)

    def finish(self, depth: int, last: nn.Module, hidden: torch.Tensor) -> None:
        """Look at the output (B, 1 + P, C) of the last layer that ran, and at the layer that would come next."""
        if "encoder_features" in self.needs:
            self.notes["encoder_features"] = hidden[:, 1:]
        if self.feature_layer is not None and self.feature_layer % depth == depth - 1:
            self.notes["layer_features"] = hidden[:, 1:]
        if {"final_keys", "final_cls_attention"} & self.needs:
            self.notes["final_keys"], self.notes["final_cls_attention"] = wide_head(last, hidden)
        if self.layers:
            self.notes["received_attention"] = torch.stack(
                [self._received[wanted % depth] for wanted in self.layers], -1
            )
