"""Models of transformers by name, and made-up images in the format of their processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch

USUAL_TOKENS = 576
"""Visual tokens of a made-up image where a model reads images of any size."""

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        {
            "text_config": {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            },
            "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        },
    )
}
"""Name -> family and configuration."""


def transformers_config(model: str) -> Any | None:
    """The configuration of a vision-language model of transformers; None for a checkpoint of LLaVA's own format.

    ``model`` is a name in `PUBLISHED`, a family (its default configuration), a checkpoint folder, a hub id or
    "llava-mini-hf"; a missing checkpoint is an `OSError`, a family that cannot be pruned a `ValueError`.
    """
    from transformers import AutoConfig

    from llava import hf
    from llava.adapters.transformers import FAMILIES
    from llava.model.checkpoint import is_of_transformers, read_config, resolve_model_path

    if is_configuration(model):
        kind, settings = PUBLISHED.get(model, (model, {}))
        return AutoConfig.for_model(kind, **settings)
    path = resolve_model_path(hf.path_of(model))
    known = read_config(path)
    if not is_of_transformers(known):
        return None
    if known.get("model_type") not in FAMILIES:
        raise ValueError(f"{model} is a {known.get('model_type')!r} model; supported: {', '.join(sorted(FAMILIES))}")
    return AutoConfig.from_pretrained(path)


def is_configuration(model: str) -> bool:
    """Whether a name stands for a configuration alone, of a family or in `PUBLISHED`, and not for weights."""
    from llava.adapters.transformers import FAMILIES

    return (model in PUBLISHED or model in FAMILIES) and not Path(model).is_dir()


def reads_whole(config: Any) -> bool:
    """Whether a model reads images of any size as they are, and not in crops of one size."""
    return _maker(config) in (_grid, _stated_size)


def made_up_images(
    config: Any, numbers: Sequence[int], visual: int | None = None, crops: int | None = None
) -> dict[str, torch.Tensor]:
    """Random images, the same for the same number: arguments of ``get_image_features``.

    ``visual`` are the visual tokens of each, for a model that `reads_whole`; ``crops`` are the crops of each, for
    others: by default 1, or 5 where an image is a base view and four crops.
    """
    make = _maker(config)
    found: list[dict[str, torch.Tensor]] = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        found.append(make(config, draw, visual or USUAL_TOKENS, crops))
    return {name: torch.cat([image[name] for image in found]) for name in found[0]}


Draw = Callable[..., torch.Tensor]
Maker = Callable[[Any, Draw, int, "int | None"], dict[str, torch.Tensor]]


def _maker(config: Any) -> Maker:
    """By the layout of a family's images; by default they are crops of one size."""
    from llava.adapters.transformers import family

    layouts = family.FAMILIES[config.model_type].layouts
    if layouts is family.square_or_stated_size:
        return _stated_size if config.vision_config.model_type == "pixtral" else _crops
    makers: dict[Any, Maker] = {
        family.anyres: _anyres,
        family.grid_thw: _grid,
        family.square_tiles: _crops_of_a_prompt,
        family.stated_size: _stated_size,
    }
    return makers.get(layouts, _crops)


def _side(config: Any) -> tuple[int, int]:
    side = config.vision_config.image_size
    return (side, side) if isinstance(side, int) else tuple(side)


def _rows_and_columns(tokens: int) -> tuple[int, int]:
    """As square as the number allows."""
    rows = next(rows for rows in range(isqrt(tokens), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


def _crops(config: Any, draw: Draw, visual: int, crops: int | None) -> dict[str, torch.Tensor]:
    return {"pixel_values": draw(crops or 1, 3, *_side(config))}


def _crops_of_a_prompt(config: Any, draw: Draw, visual: int, crops: int | None) -> dict[str, torch.Tensor]:
    return {"pixel_values": draw(1, crops or 1, 3, *_side(config))}


def _anyres(config: Any, draw: Draw, visual: int, crops: int | None) -> dict[str, torch.Tensor]:
    height, width = _side(config)
    crops = crops or 5
    sizes = [size for size in config.image_grid_pinpoints if size[0] * size[1] == (crops - 1) * height * width]
    if not sizes:
        known = sorted({1 + rows * columns // (height * width) for rows, columns in config.image_grid_pinpoints})
        raise ValueError(f"an image of this model has {', '.join(map(str, known))} crops, not {crops}")
    # The squarest: where several have as many crops, unpadding changes nothing.
    size = min(sizes, key=lambda size: abs(size[0] - size[1]))
    return {"pixel_values": draw(1, crops, 3, height, width), "image_sizes": torch.tensor([size])}


def _grid(config: Any, draw: Draw, visual: int, crops: int | None) -> dict[str, torch.Tensor]:
    vision = config.vision_config
    rows, columns = (tokens * vision.spatial_merge_size for tokens in _rows_and_columns(visual))
    numbers = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": draw(rows * columns, numbers), "image_grid_thw": torch.tensor([[1, rows, columns]])}


def _stated_size(config: Any, draw: Draw, visual: int, crops: int | None) -> dict[str, torch.Tensor]:
    cell = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    height, width = (tokens * cell for tokens in _rows_and_columns(visual))
    return {"pixel_values": draw(1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}


def made_up_prompts(
    model: Any, text: Sequence[tuple[Sequence[int], Sequence[int]]], images: Sequence[int], visual: int | None = None
) -> dict[str, torch.Tensor]:
    """Prompts of a model of transformers with an image each: arguments of ``forward`` and ``generate``.

    ``text`` are the ids before and after each image; the others as in `made_up_images`.
    """
    device = model.get_input_embeddings().weight.device
    pixels = {
        name: value.to(device, model.dtype if value.is_floating_point() else None)
        for name, value in made_up_images(model.config, images, visual).items()
    }
    with torch.no_grad():
        output = model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
    visual = sum(entry.numel() // entry.shape[-1] for entry in output) // len(images)
    mark = model.config.image_token_id
    ids = torch.tensor([[*before, *[mark] * visual, *after] for before, after in text], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels} | _types(model, ids == mark)


def _types(model: Any, marks: torch.Tensor) -> dict[str, torch.Tensor]:
    """For models with rotary positions of several axes, which find the images by it."""
    return {"mm_token_type_ids": marks.long()} if hasattr(model.base_model, "get_rope_index") else {}
