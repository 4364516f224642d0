"""Real image processors of transformers at the size of the tiny models, with prompts of the tiny models' ids.

``tiny_processor(name)`` is called as `llava.hf.prompt` calls a model's processor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as tf
from PIL import Image

from tiny_vlms import _PINPOINTS, BREAK, END, IMAGE, START, TinyModel, tiny


def _square(kind: str, side: int, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, kind)(size={"height": side, "width": side}, **more)


def _clip(kind: str, **more: Any) -> Callable[[], Any]:
    """Shortest edge, then the middle."""
    crop = {"height": 30, "width": 30}
    return lambda: getattr(tf, kind)(size={"shortest_edge": 30}, crop_size=crop, **more)


def _grid(kind: str) -> Callable[[], Any]:
    size = {"shortest_edge": 24 * 24, "longest_edge": 64 * 64}
    return lambda: getattr(tf, kind)(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)


def _split(kind: str) -> Callable[[], Any]:
    longest = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
    return lambda: getattr(tf, kind)(**longest, do_image_splitting=True)


def _pixtral(cell: int) -> Callable[[], Any]:
    return lambda: tf.PixtralImageProcessor(size={"longest_edge": 48}, patch_size={"height": cell, "width": cell})


_TILED = {"crop_to_patches": True, "min_patches": 1, "max_patches": 6}
_PAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 8,
    "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
_QWEN = _grid("Qwen2VLImageProcessor")

PROCESSORS: dict[str, Callable[[], Any]] = {
    "aya_vision": _square("GotOcr2ImageProcessor", 32, **_TILED),
    "cohere2_vision": _square("Cohere2VisionImageProcessor", 32, **_TILED),
    "gemma3": _square("Gemma3ImageProcessor", 32, **_PAN),
    "glm46v": _grid("Glm46VImageProcessor"),
    "glm4v": _grid("Glm4vImageProcessor"),
    "glm4v_moe": _grid("Glm4vImageProcessor"),
    "idefics3": _split("Idefics3ImageProcessor"),
    "internvl": _square("GotOcr2ImageProcessor", 32, **_TILED),
    "llava": _clip("LlavaImageProcessor", do_pad=True),
    "llava_next": _clip("LlavaNextImageProcessor", image_grid_pinpoints=_PINPOINTS),
    "llava_onevision": _square("LlavaOnevisionImageProcessor", 30, image_grid_pinpoints=_PINPOINTS),
    "mistral3": _pixtral(8),
    "ovis2": _square("Ovis2ImageProcessor", 32, **_TILED),
    "paligemma": _square("SiglipImageProcessor", 24),
    "pixtral": _pixtral(4),
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "smolvlm": _split("SmolVLMImageProcessor"),
    "vipllava": _clip("CLIPImageProcessor"),
}
TAGGED = ("aya_vision", "idefics3", "smolvlm")
"""Families that write text between an image's tiles."""


class TinyProcessor:
    """What `llava.hf.prompt` needs of a processor."""

    chat_template = "{{ messages }}"

    def __init__(self, name: str, made: TinyModel):
        self.name, self.made, self.images = name, made, PROCESSORS[name]()
        self.taken = set(inspect.signature(made.model.base_model.get_image_features).parameters)

    def apply_chat_template(self, messages: list[dict[str, Any]], **settings: Any) -> tf.BatchFeature:
        images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
        ids = [3, *(token for image in images for token in self._placeholders(image)), 5, 6]
        found = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        if self.made.types:
            found[self.made.types] = (found["input_ids"] == IMAGE).long() * self.made.image_type
        return tf.BatchFeature(found | self._pixels(images))

    def _pixels(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        nested = [list(images)] if self.name in ("idefics3", "smolvlm") else list(images)
        made = self.images(nested, return_tensors="pt")
        return {name: value for name, value in made.items() if name in self.taken}

    def _placeholders(self, image: Image.Image) -> list[int]:
        """As many as the model makes of this image alone."""
        with torch.no_grad():
            base = self.made.model.base_model
            entries = base.get_image_features(**self._pixels([image]), return_dict=True).pooler_output
        counts = [entry.reshape(-1, entry.shape[-1]).shape[0] for entry in entries]
        if self.name in TAGGED:
            return [START, *[BREAK, *[IMAGE] * 16] * (sum(counts) // 16), END]
        if self.name in ("internvl", "cohere2_vision", "ovis2"):
            return [START, *[IMAGE] * sum(counts), END]
        return [token for count in counts for token in (START, *[IMAGE] * count, END)]


def tiny_processor(name: str) -> TinyProcessor:
    """The processor of the tiny model of a family."""
    return TinyProcessor(name, tiny(name))
