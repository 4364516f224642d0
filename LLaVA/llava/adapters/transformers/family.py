"""What differs between families of vision-language models; to add one, add a line to `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from llava.pruning.layout import FeatureMap, Layout

Inputs = Mapping[str, Any]
"""The arguments of ``get_image_features``, by name."""


@dataclass(frozen=True)
class Family:
    """How the images of a family of models lie in its encoder's output and in its prompts.

    Attributes
    ----------
    image : str
        What counts as one image, with a budget of its own: an "entry" of the encoder's ``pooler_output``, or a "run" of
        placeholders that stand side by side in the prompt (all tiles of an InternVL image, one tile of Idefics3).
    layouts : callable, optional
        (base model, entries, arguments of ``get_image_features``) -> for each entry the feature maps of its tokens, or
        None where they are not known. Without it, methods that need a grid (``downsample``) are refused.
    first_position : int
        Rotary position of a prompt's first token.
    """

    image: Literal["entry", "run"] = "run"
    layouts: Callable[[nn.Module, Sequence[torch.Tensor], Inputs], list[Layout | None]] | None = None
    first_position: int = 0


def square(base: nn.Module, entries: Sequence[torch.Tensor], inputs: Inputs) -> list[Layout | None]:
    """Every entry is a square map."""
    sides = [round(len(entry) ** 0.5) for entry in entries]
    return [
        (FeatureMap(side, side),) if side**2 == len(entry) else None for side, entry in zip(sides, entries, strict=True)
    ]


def grid_thw(base: nn.Module, entries: Sequence[torch.Tensor], inputs: Inputs) -> list[Layout | None]:
    """Qwen and GLM: patches (frames, rows, columns) are stated, and merged in squares."""
    merge = base.config.vision_config.spatial_merge_size
    return [
        (FeatureMap(rows // merge, columns // merge),) * frames
        for frames, rows, columns in inputs["image_grid_thw"].tolist()
    ]


def square_tiles(base: nn.Module, entries: Sequence[torch.Tensor], inputs: Inputs) -> list[Layout | None]:
    """Idefics3: an entry holds all tiles of a prompt, each a square map."""
    side = round(base.image_seq_len**0.5)
    return [(FeatureMap(side, side),) * (len(entry) // base.image_seq_len) for entry in entries]


def stated_size(base: nn.Module, entries: Sequence[torch.Tensor], inputs: Inputs) -> list[Layout | None]:
    """Pixtral's tower: a map of the image's own size."""
    cell = base.config.vision_config.patch_size * getattr(base.config, "spatial_merge_size", 1)
    return [(FeatureMap(height // cell, width // cell),) for height, width in inputs["image_sizes"].tolist()]


def square_or_stated_size(base: nn.Module, entries: Sequence[torch.Tensor], inputs: Inputs) -> list[Layout | None]:
    """LLaVA: CLIP's square, or Pixtral's tower."""
    return (square if inputs.get("image_sizes") is None else stated_size)(base, entries, inputs)


def anyres(base: nn.Module, entries: Sequence[torch.Tensor], inputs: Inputs) -> list[Layout | None]:
    """LLaVA-NeXT and -OneVision: a base view, then the unpadded map of the crops with a newline token a row."""
    vision = base.config.vision_config
    side = vision.image_size // vision.patch_size
    layouts: list[Layout | None] = []
    for entry, size in zip(entries, inputs["image_sizes"].tolist(), strict=True):
        rest = len(entry) - side**2
        if rest in (0, 1):
            layouts.append((FeatureMap(side, side, "end" if rest else "none"),))
        else:
            layouts.append((FeatureMap(side, side), _crops(base, size, side, rest)))
    return layouts


def _crops(base: nn.Module, size: Sequence[int], side: int, tokens: int) -> FeatureMap:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    rows, columns = get_anyres_image_grid_shape(
        size, base.config.image_grid_pinpoints, base.config.vision_config.image_size
    )
    height, width = unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), size).shape[1:]
    if height * (width + 1) == tokens:
        return FeatureMap(height, width, "row", side, (rows * side - height) // 2, (columns * side - width) // 2)
    # OneVision shrinks large maps, whose crops are then no whole numbers of tokens.
    most = int(base.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    shrink = (height * width / (most * side**2)) ** 0.5
    return FeatureMap(int(height // shrink), int(width // shrink), "row")


FAMILIES: dict[str, Family] = {
    "aya_vision": Family(layouts=square),
    "cohere2_vision": Family(layouts=square),
    "gemma3": Family("entry", square),
    "glm46v": Family("entry", grid_thw),
    "glm4v": Family("entry", grid_thw),
    "idefics3": Family(layouts=square_tiles),
    "internvl": Family(layouts=square),
    "llava": Family("entry", square_or_stated_size),
    "llava_next": Family("entry", anyres),
    "llava_onevision": Family("entry", anyres),
    "mistral3": Family("entry", stated_size),
    "ovis2": Family(),
    "paligemma": Family("entry", square, first_position=1),
    "qwen2_5_vl": Family("entry", grid_thw),
    "qwen2_vl": Family("entry", grid_thw),
    "qwen3_5": Family("entry", grid_thw),
    "qwen3_vl": Family("entry", grid_thw),
    "qwen3_vl_moe": Family("entry", grid_thw),
    "smolvlm": Family(layouts=square_tiles),
    "vipllava": Family("entry", square),
}
"""By ``model.config.model_type``."""


def register_family(model_type: str, family: Family) -> None:
    """Make a family of models known; an existing one is replaced.

    Parameters
    ----------
    model_type : str
        ``model.config.model_type``.
    family : Family
    """
    FAMILIES[model_type] = family
