"""What a selection method may look at besides the visual tokens: one table.

A method names what it reads in `Pruner.needs`; the model computes that, and nothing else. To add a signal, add a field
to `Signals` and compute it where its column says: the vision encoder's in
``llava.model.multimodal_encoder.observations`` and ``llava.adapters.transformers.encoder``, the decoder's in
``llava.model.language_model.observed_attention``, the prompt's where the images are encoded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch

Source = Literal["encoder", "decoder", "prompt", "text encoder", "pixels"]


def _signal(computed_by: Source, shape: str, meaning: str) -> Any:
    """A field with its line of the table. Its type is what a method finds: `reduce` calls none without its signals."""
    return field(default=None, metadata={"computed_by": computed_by, "shape": shape, "meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Everything that a method may ask for, for B images of N tokens; None unless it does.

    In tensors axis 0 is the image and axis 1 the token; image-newline tokens have zeros in what the encoder computes.
    """

    image_keys: tuple[int, ...] = _signal(
        "prompt", "B integers", "digest of the image's content, for methods that draw at random"
    )
    patch_ids: torch.Tensor = _signal(
        "pixels",
        "(B, N) int64",
        "the same number where patches have the same pixels, 0 for newlines and [CLS]; for drop_duplicates",
    )
    question: tuple[torch.Tensor, ...] = _signal(
        "prompt", "B tensors (T, D)", "embedded text of the prompt after its first image"
    )
    text_similarity: torch.Tensor = _signal(
        "text encoder", "(B, N) float32", "cosine between a patch and the question in CLIP's common space"
    )
    encoder_features: torch.Tensor = _signal(
        "encoder", "(B, N, C)", "features of the vision encoder, before the projector"
    )
    layer_features: torch.Tensor = _signal(
        "encoder", "(B, N, C)", "output of the encoder layer that is the method's feature_layer"
    )
    encoder_keys: torch.Tensor = _signal(
        "encoder", "(B, N, c)", "keys, averaged over the heads, of the encoder layer whose output is read"
    )
    cls_attention: torch.Tensor = _signal("encoder", "(B, N, H) float32", "attention of [CLS] in that layer, per head")
    received_attention: torch.Tensor = _signal(
        "encoder",
        "(B, N, E) float32",
        "attention averaged over heads and over all queries, in each of the method's encoder_layers",
    )
    layer_cls_attention: torch.Tensor = _signal(
        "encoder",
        "(B, N, E) float32",
        "attention of [CLS], averaged over the heads, in each of the method's encoder_layers",
    )
    cls_affinity: torch.Tensor = _signal(
        "encoder",
        "(B, N, E) float32",
        "softmax of the products of all tokens' values with [CLS]'s, averaged over the heads, in each of them",
    )
    value_norms: torch.Tensor = _signal(
        "encoder", "(B, N, E) float32", "L1 norm of a token's value, the mean of its heads, in each of them"
    )
    final_keys: torch.Tensor = _signal(
        "encoder", "(B, N, C)", "keys of the encoder's last layer, all heads side by side"
    )
    final_cls_attention: torch.Tensor = _signal(
        "encoder", "(B, N) float32", "attention of [CLS] in the encoder's last layer, taken as one wide head"
    )
    last_attention: torch.Tensor = _signal(
        "decoder",
        "(B, N, H) float32",
        "attention of the last prompt token, per head, in the decoder layer before the drop",
    )
    next_attention: torch.Tensor = _signal(
        "decoder", "(B, N, H) float32", "the same in the decoder layer at whose input the drop happens"
    )
    rater_attention: torch.Tensor = _signal(
        "decoder",
        "(B, N) float32",
        "attention, in the decoder layer before the drop, averaged over heads and over the text tokens that the "
        "method's raters(visual (n, D), text (T, D)) -> bool (T,) chose at the decoder's input",
    )
    visual_attention: torch.Tensor = _signal(
        "decoder",
        "(B, N) float32",
        "for a drop after a layer's attention: what a token receives there, in the head where it is most, averaged "
        "over the visual tokens of its image that are present",
    )
    text_attention: torch.Tensor = _signal(
        "decoder", "(B, N) float32", "the same, summed over the text of the prompt after the image"
    )
    keys: torch.Tensor = _signal(
        "decoder",
        "(B, N, C)",
        "keys, with their rotary embedding, of the decoder layer before the drop, all heads side by side",
    )
    text_keys: tuple[torch.Tensor, ...] = _signal(
        "decoder", "B tensors (T, C)", "the same of the prompt's text after the image"
    )
    states: torch.Tensor = _signal("decoder", "(B, N, D)", "hidden states at the drop, after the decoder's final norm")
    text_states: tuple[torch.Tensor, ...] = _signal(
        "decoder", "B tensors (T, D)", "the same of the prompt's text after the image"
    )


class Signal(NamedTuple):
    """One line of the table."""

    name: str
    computed_by: Source
    shape: str
    meaning: str

    @property
    def per_token(self) -> bool:
        """Whether there is a value for each visual token, in one tensor; else a tuple with one for each image."""
        return self.shape.startswith("(B, N")

    @property
    def per_layer(self) -> bool:
        """Whether there is a value for each of the method's ``encoder_layers``, in the last axis."""
        return "E)" in self.shape


SIGNALS = {one.name: Signal(one.name, **one.metadata) for one in fields(Signals)}


def computed_by(*sources: Source) -> frozenset[str]:
    """The names of the signals that one of these computes."""
    return frozenset(signal.name for signal in SIGNALS.values() if signal.computed_by in sources)


ENCODER_SIGNALS = computed_by("encoder")

CLS_SIGNALS = frozenset({"cls_attention", "layer_cls_attention", "cls_affinity", "final_cls_attention"})
"""Those of the encoder that only one with a [CLS] token has."""
DECODER_SIGNALS = computed_by("decoder")
TEXT_SIGNALS = {"text_keys": "keys", "text_states": "states"}
"""Those of the text after an image, and whose values at that text they are."""


def content_key(tensor: torch.Tensor) -> int:
    """A 63-bit digest of a tensor's values (read as float32), the same in every process and on every machine."""
    values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return int.from_bytes(hashlib.sha256(values.numpy().tobytes()).digest()[:8], "little") >> 1
