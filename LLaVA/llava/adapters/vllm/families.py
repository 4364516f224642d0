"""What differs between families of vLLM's models; to add one, add a line to `FAMILIES`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from types import SimpleNamespace
from typing import Any

import torch

from llava.adapters.transformers.family import Entries, Inputs, anyres, grid_thw, patches, square
from llava.pruning.tokens import Layout, TokenGrid

Mixin: Any = object
"""What stands before a class of vLLM sees its attributes, which no type checker knows."""


@dataclass(frozen=True)
class Family:
    """How the images of a family lie in the inputs of vLLM's model.

    Attributes
    ----------
    module : str
        Of ``vllm.model_executor.models``: where the class is that the pruned one extends.
    sizes : callable
        Inputs -> for each image its number of units: crops, tiles or patches.
    unit_tokens : callable
        Configuration of the model -> visual tokens that a unit makes, before any is dropped.
    flat : str
        The input that holds the units of all images one after the other; empty where each has an entry per image.
    layouts : callable
        (model, features of each image, inputs) -> for each image how its tokens lie on it, or None where it is not
        known; as in the adapter for transformers.
    name : str
        Of vLLM's class, where it is not the architecture's.
    to_tokens : callable, optional
        (model, values (I, P, C) of the patches of each call of the vision tower, features of each image, inputs) -> for
        each image the values (N, C) of its tokens. Without it, methods that look at the vision encoder are refused.
    mrope : bool
        Whether rotary positions have three axes.
    tower : str or None
        The ``model_type`` of a vision tower that is not served, though the architecture is.
    """

    module: str
    sizes: Callable[[Inputs], list[int]]
    unit_tokens: Callable[[Any], float]
    layouts: Callable[[Any, Entries, Inputs], list[Layout | None]]
    flat: str = ""
    name: str = ""
    to_tokens: Callable[[Any, list[torch.Tensor], Entries, Inputs], list[torch.Tensor]] | None = None
    mrope: bool = False
    tower: str | None = None


def _crops(inputs: Inputs) -> list[int]:
    return [1 if pixels.ndim == 3 else len(pixels) for pixels in inputs["pixel_values"]]


def _patches(inputs: Inputs) -> list[int]:
    return inputs["image_grid_thw"].prod(-1).tolist()


def _tiles(inputs: Inputs) -> list[int]:
    return inputs["image_num_patches"].tolist()


def _clip_tokens(config: Any) -> float:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def _merged_tokens(config: Any) -> float:
    return config.vision_config.spatial_merge_size**-2


def _tile_tokens(config: Any) -> float:
    return config.image_seq_length


def _tiled(base: Any, entries: Entries, inputs: Inputs) -> list[Layout | None]:
    side = isqrt(base.config.image_seq_length)
    return [(TokenGrid(side, side),) * (len(entry) // side**2) for entry in entries]


def _repacked(base: Any, calls: list[torch.Tensor], entries: Entries, inputs: Inputs) -> list[torch.Tensor]:
    """vLLM's own packing of crops, with zeros for newline tokens."""
    values = torch.cat(calls)
    newline = values.new_zeros(values.shape[-1])
    pack = type(base)._merge_image_patch_embeddings
    of_class = SimpleNamespace(config=base.config, image_newline=newline)
    more = {"image_newline": newline} if "image_newline" in inspect.signature(pack).parameters else {}
    return [
        pack(of_class, size, own, strategy="spatial_unpad", **more)
        for size, own in zip(inputs["image_sizes"], values.split(_crops(inputs)), strict=True)
    ]


FAMILIES = {
    "LlavaForConditionalGeneration": Family("llava", _crops, _clip_tokens, square, to_tokens=patches, tower="pixtral"),
    "LlavaNextForConditionalGeneration": Family("llava_next", _crops, _clip_tokens, anyres, to_tokens=_repacked),
    "LlavaOnevisionForConditionalGeneration": Family(
        "llava_onevision", _crops, _clip_tokens, anyres, to_tokens=_repacked
    ),
    "InternVLForConditionalGeneration": Family(
        "interns1", _tiles, _tile_tokens, _tiled, "pixel_values", name="InternS1ForConditionalGeneration"
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "qwen2_5_vl", _patches, _merged_tokens, grid_thw, "pixel_values", mrope=True
    ),
    "Qwen3VLForConditionalGeneration": Family(
        "qwen3_vl", _patches, _merged_tokens, grid_thw, "pixel_values", mrope=True
    ),
}
"""By architecture, as ``config.json`` names it."""
