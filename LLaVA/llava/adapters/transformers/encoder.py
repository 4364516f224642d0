"""What a pruner wants to know about the vision encoder, for every patch, while the images are encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from llava.adapters.transformers.attention import Call, Watch
from llava.adapters.transformers.family import Model
from llava.pruning.base import Pruner
from llava.pruning.signals import CLS_SIGNALS, ENCODER_SIGNALS, SIGNALS
from llava.pruning.similarity import products

Signals = dict[str, list[torch.Tensor]]
"""Name of a signal -> (I, P, C) of the patches of each call of the encoder's attention: a batch of images, or a packed
sequence of several (or a window of one)."""


BEYOND = frozenset({"final_keys", "final_cls_attention"})
"""Read in the layer after those that the language model's input went through, if there is one."""


class EncoderView:
    """The vision encoder of a model of transformers, as far as a pruner needs to see it.

    A ValueError if the encoder has no [CLS] token, or not the layers, that the pruner asks for.
    """

    def __init__(self, model: Model, pruner: Pruner):
        self.needs, self.pruner, kind = pruner.needs & ENCODER_SIGNALS, pruner, type(pruner).__name__
        self.tower = self._tower_of(model)
        self.attention = self._attention_modules()
        self.depth = self._depth_read(model.config)
        self.has_cls = has_cls_token(self.tower)
        if self.needs & CLS_SIGNALS and not self.has_cls:
            raise ValueError(
                f"{kind} ranks by the attention of [CLS], and the vision encoder, {type(self.tower).__name__}, "
                "has no such token"
            )
        for layer in (layer for name in sorted(self.needs - BEYOND) for layer in self._layers_of(name)):
            if not -self.depth <= layer < self.depth:
                raise ValueError(f"{kind} asks for layer {layer} of the vision encoder, of which {self.depth} are read")
        whole: Sequence[int] = getattr(model.config.vision_config, "fullatt_block_indexes", None) or ()
        layers = pruner.encoder_layers if any(SIGNALS[name].per_layer for name in self.needs) else ()
        windowed = [layer for layer in layers if whole and layer % self.depth not in whole]
        if windowed:
            raise ValueError(
                f"{kind} asks for the attention of layer {windowed[0]} of the vision encoder, which only looks at "
                f"windows; layers {', '.join(map(str, whole))} look at the whole image"
            )

    # Where a library keeps what is looked at: these four are transformers'.

    def _tower_of(self, model: Model) -> Model:
        return model.get_encoder("image")

    def _attention_modules(self) -> dict[str, Model]:
        """The attention of each layer, in order; the layer is the module above it."""
        return {
            name: module
            for name, module in self.tower.named_modules()
            if "Attention" in type(module).__name__ and hasattr(module, "config") and hasattr(module, "is_causal")
        }

    def _depth_read(self, config: Any) -> int:
        """How many of the encoder's layers the language model's input went through."""
        layer = getattr(config, "vision_feature_layer", None)
        layer = layer if isinstance(layer, int) else -1
        return layer if layer >= 0 else len(self.attention) + 1 + layer

    def _watch(self, attention: Model, look: Callable[[Call], None]) -> Callable[[], None]:
        """Call ``look`` with every `Call` of a module, until what is returned is called."""
        return Watch(attention, look).remove

    @property
    def width(self) -> int:
        """Numbers of a patch in the encoder."""
        config = self.tower.config
        return getattr(config, "embed_dim", None) or config.hidden_size

    def _layers_of(self, name: str) -> Sequence[int]:
        """The layers in which a signal is read, as the method numbers them."""
        if name in BEYOND:
            return (min(self.depth, len(self.attention) - 1),)
        if name == "layer_features":
            return () if self.pruner.feature_layer is None else (self.pruner.feature_layer,)
        return self.pruner.encoder_layers if SIGNALS[name].per_layer else (self.depth - 1,)

    @contextmanager
    def observed(self) -> Iterator[Signals]:
        """Yields signals that are filled when images have been encoded inside the block.

        Of several layers, side by side.
        """
        signals: Signals = {}
        found: dict[str, list[list[torch.Tensor]]] = {}  # for each name and layer, of every call
        names, modules = list(self.attention), list(self.attention.values())
        with ExitStack() as stack:
            for name in sorted(self.needs):
                found[name] = [[] for _ in self._layers_of(name)]
                for layer, notes in zip(self._layers_of(name), found[name], strict=True):
                    number = layer if name in BEYOND else layer % self.depth
                    if name in OF_ATTENTION:
                        stack.callback(self._watch(modules[number], self._noting(notes, OF_ATTENTION[name])))
                    else:
                        block = self.tower.get_submodule(names[number].rpartition(".")[0])
                        stack.callback(block.register_forward_hook(self._noting(notes, _states)).remove)
            yield signals
        for name, layers in found.items():
            if layers:
                signals[name] = (
                    layers[0] if len(layers) == 1 else [torch.cat(c, dim=-1) for c in zip(*layers, strict=True)]
                )

    def _noting(self, notes: list[torch.Tensor], look: Callable[..., torch.Tensor]) -> Callable[..., None]:
        def note(*args: Any) -> None:
            values = look(*args)
            notes.append(values[:, 1:] if self.has_cls else values)

        return note


def of_tokens(
    base: Model, family: Any, entries: Sequence[torch.Tensor], inputs: Mapping[str, Any], patches: Signals
) -> dict[str, list[torch.Tensor]]:
    """Signals of the tokens of each entry of an encoder's output: name -> (N, C), or (N,) where there is one channel.

    ``family`` is one of transformers' or vLLM's, with ``to_tokens`` if there are any signals.
    """
    found = {name: family.to_tokens(base, calls, entries, inputs) for name, calls in patches.items()}
    if "final_cls_attention" in found:
        found["final_cls_attention"] = [values[:, 0] for values in found["final_cls_attention"]]
    return found


def has_cls_token(tower: Model) -> bool:
    """Whether a vision encoder has a [CLS] token."""
    embeddings = getattr(tower, "embeddings", None)
    return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))


def _received(call: Call) -> torch.Tensor:
    """What each patch receives, averaged over heads and its image's queries; maps (H, P, P) of one row at a time."""
    every = torch.arange(call.query.shape[2], device=call.query.device)[None]
    rows = [call.rows(slice(row, row + 1)) for row in range(len(call.query))]
    return torch.stack([row.weights(every)[0].mean(dim=0).sum(dim=0) / row.askers() for row in rows])


def _paid_by_cls(call: Call) -> torch.Tensor:
    """Attention of [CLS], per head: (B, H, T)."""
    first = torch.zeros(len(call.query), 1, dtype=torch.int64, device=call.query.device)
    return call.weights(first)[:, :, 0]


def _affinity(call: Call) -> torch.Tensor:
    """The softmax of the products of all values with that of [CLS], averaged over the heads: (B, T)."""
    return products(call.value[:, :, :1], call.value).softmax(dim=-1).mean(dim=1)[:, 0]


def _wide_head(call: Call) -> torch.Tensor:
    """Attention of [CLS] if all heads were one: (B, T)."""
    keys, query = _wide_keys(call), call.query[:, :, :1].transpose(1, 2).flatten(2)
    with torch.autocast(keys.device.type, enabled=False):
        return ((query @ keys.mT).float() * keys.shape[-1] ** -0.5).softmax(dim=-1)[:, 0]


def _wide_keys(call: Call) -> torch.Tensor:
    return call.key.transpose(1, 2).flatten(2)


def _states(module: Any, args: tuple, output: Any) -> torch.Tensor:
    """A layer's output: (B, T, D)."""
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden if hidden.ndim == 3 else hidden[None]


OF_ATTENTION: dict[str, Callable[[Call], torch.Tensor]] = {
    "cls_attention": lambda call: _paid_by_cls(call).transpose(1, 2),
    "encoder_keys": lambda call: call.key.float().mean(dim=1),
    "final_keys": _wide_keys,
    "final_cls_attention": lambda call: _wide_head(call)[..., None],
    "received_attention": lambda call: _received(call)[..., None],
    "layer_cls_attention": lambda call: _paid_by_cls(call).mean(dim=1)[..., None],
    "cls_affinity": lambda call: _affinity(call)[..., None],
    "value_norms": lambda call: call.value.float().mean(dim=1).abs().sum(dim=-1)[..., None],
}
"""What a layer's call makes of every token: (B, T, C)."""
