"""The cost of a vision-language model of transformers: it runs without weights, and PyTorch counts.

Weights are on the device "meta", which has shapes but no values, so that a model of any size runs in seconds. Ids,
pixels and positions are real, so that the model's own code runs as usual, and no family needs a formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from llava.flops.made_up import USUAL_TOKENS, made_up_images, reads_whole
from llava.flops.shape import CHUNK, Cost, DecoderShape, ModelShape

LENGTHS = (1, CHUNK, 2 * CHUNK)
"""Tokens of the prompts by which the decoder's costs are measured."""
SIZES = (16, 64)
"""Visual tokens of the images by which an encoder's costs are measured: squares of whole windows."""


def family_shape(config: Any, visual: int | None = None, crops: int | None = None) -> ModelShape:
    """The shape of a model by its configuration, with an image of `llava.flops.made_up.made_up_images`.

    It is a `ValueError` if an image of this model cannot have so many visual tokens or crops, or if a model of this
    configuration does not run.
    """
    try:
        return _counted(config, visual, crops)
    except (
        RuntimeError,
        TypeError,
        AttributeError,
    ) as error:  # several families' default configurations are inconsistent
        reason = str(error).splitlines()[0]
        raise ValueError(f"a {config.model_type} model of this configuration does not run: {reason}") from error


def _counted(config: Any, visual: int | None, crops: int | None) -> ModelShape:
    model = _without_weights(config)
    if reads_whole(config):
        if crops not in (None, 1):
            raise ValueError(f"{config.model_type} models read an image whole, not in {crops} crops")
        visual = visual or USUAL_TOKENS
        tower, projector = _encoder_costs(model)
        return ModelShape(_decoder(model), tower, projector, visual, visual)
    pixels = made_up_images(config, [0], crops=crops)
    crops = pixels["pixel_values"].shape[:-3].numel()
    found, *parts = _encoded(model, pixels)
    if visual not in (None, found):
        raise ValueError(f"an image of {crops} crops has {found} visual tokens in this model, not {visual}")
    tower, projector = (Cost(part // (2 * crops)) for part in parts)
    return ModelShape(_decoder(model), tower, projector, found, crops)


def crops_seen(
    config: Any, shape: ModelShape, totals: Sequence[int], sizes: torch.Tensor | None = None
) -> Sequence[int]:
    """Crops of images, as `ModelShape` counts them, by their visual tokens.

    Where crops are packed, their number follows from the images' sizes (I, 2), height and width.
    """
    if shape.reads_whole:
        return totals
    if sizes is None or len(sizes) != len(totals) or not hasattr(config, "image_grid_pinpoints"):
        return [max(1, total * shape.crops // shape.visual_tokens) for total in totals]
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = config.vision_config.image_size
    return [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes]


def _encoder_costs(model: Any) -> list[Cost]:
    """Of tower and projector, per visual token and per pair of them."""
    few, many = SIZES
    (_, *less), (_, *more) = (_encoded(model, made_up_images(model.config, [0], tokens)) for tokens in SIZES)
    costs = []
    for one, other in zip(less, more, strict=True):
        quadratic = (other * few - one * many) // (2 * few * many * (many - few))
        costs.append(Cost(one // (2 * few) - quadratic * few, quadratic))
    return costs


def _decoder(model: Any) -> DecoderShape:
    text = model.config.get_text_config()
    one, chunk, two = (_layers(model, n) for n in LENGTHS)
    costs = []
    for a, b, c in zip(one, chunk, two, strict=True):
        # a = 2 (linear + quadratic + chunk), b and c the same for one and two whole chunks.
        quadratic = (c - 2 * b) // (4 * CHUNK**2)
        linear = (b - a - 2 * (CHUNK**2 - 1) * quadratic) // (2 * (CHUNK - 1))
        costs.append(Cost(linear, quadratic, chunk=a // 2 - linear - quadratic))
    experts = getattr(text, "num_experts_per_tok", None)
    wide = experts * text.moe_intermediate_size if experts else text.intermediate_size
    return DecoderShape(text.hidden_size, wide, text.vocab_size, tuple(costs))


def _layers(model: Any, n: int) -> list[int]:
    """FLOPs of each decoder layer for a prompt of n tokens."""
    decoder, counter = model.get_decoder(), FlopCounterMode(display=False)
    embedded = torch.empty(1, n, decoder.config.hidden_size, device="meta")
    moments: list[int] = []

    def note(*_) -> None:
        moments.append(counter.get_total_flops())

    handles = [layer.register_forward_pre_hook(note) for layer in decoder.layers]
    handles.append(decoder.layers[-1].register_forward_hook(note))
    with torch.no_grad(), _Weightless(), counter:
        decoder(inputs_embeds=embedded, use_cache=False)
    for handle in handles:
        handle.remove()
    return [after - before for before, after in pairwise(moments)]


def _encoded(model: Any, pixels: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
    """Visual tokens of images, and the FLOPs of tower and projector."""
    counter, moments = FlopCounterMode(display=False), list[int]()
    handle = model.get_encoder("image").register_forward_hook(lambda *_: moments.append(counter.get_total_flops()))
    with torch.no_grad(), _Weightless(), counter:
        output = model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
    handle.remove()
    tokens = sum(entry.numel() // entry.shape[-1] for entry in output)
    return tokens, moments[-1], counter.get_total_flops() - moments[-1]


def _without_weights(config: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    settings = {"attn_implementation": "sdpa"}
    if getattr(config.get_text_config(), "num_experts_per_tok", None):
        # Which experts a token goes to is not known, and does not matter where they are multiplied in a batch.
        settings["experts_implementation"] = "batched_mm"
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(deepcopy(config), **settings).eval()


class _Weightless(TorchDispatchMode):
    """Computes with weights on "meta": results that depend on them are there, too, all others are real."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        aten = torch.ops.aten
        hollow = any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs)))
        if operation.overloadpacket is aten.arange:
            kwargs["device"] = "cpu"
        elif operation is aten._to_copy.default and not hollow and not args[0].is_floating_point():
            kwargs.pop("device", None)
        elif hollow:
            args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return operation(*args, **kwargs)
