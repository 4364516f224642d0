"""What differs between families of vision-language models; to add one, add a line to `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from llava.pruning.tokens import Layout, TokenGrid

Model = Any
"""A model of transformers or a part of one, whose attributes are its family's: no checker knows them."""
Inputs = Mapping[str, Any]
"""The arguments of ``get_image_features``, by name."""
Entries = Sequence[torch.Tensor]
"""The features (N, D) of each entry of the encoder's output."""


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
    to_tokens : callable, optional
        (base model, values (I, P, C) of the patches of each call of the encoder, entries, arguments of
        ``get_image_features``) -> for each entry the values (N, C) of its tokens, the mean of a token's patches.
        Without it, methods that look at the vision encoder are refused.
    first_position : int
        Rotary position of a prompt's first token.
    """

    image: Literal["entry", "run"] = "run"
    layouts: Callable[[Model, Entries, Inputs], list[Layout | None]] | None = None
    to_tokens: Callable[[Model, list[torch.Tensor], Entries, Inputs], list[torch.Tensor]] | None = None
    first_position: int = 0


def square(base: Model, entries: Entries, inputs: Inputs) -> list[Layout | None]:
    """Every entry is a square map."""
    sides = [round(len(entry) ** 0.5) for entry in entries]
    return [
        (TokenGrid(side, side),) if side**2 == len(entry) else None for side, entry in zip(sides, entries, strict=True)
    ]


def grid_thw(base: Model, entries: Entries, inputs: Inputs) -> list[Layout | None]:
    """Qwen and GLM: patches (frames, rows, columns) are stated, and merged in squares."""
    merge = base.config.vision_config.spatial_merge_size
    return [
        (TokenGrid(rows // merge, columns // merge),) * frames
        for frames, rows, columns in inputs["image_grid_thw"].tolist()
    ]


def square_tiles(base: Model, entries: Entries, inputs: Inputs) -> list[Layout | None]:
    """Idefics3: an entry holds all tiles of a prompt, each a square map."""
    side = round(base.image_seq_len**0.5)
    return [(TokenGrid(side, side),) * (len(entry) // base.image_seq_len) for entry in entries]


def stated_size(base: Model, entries: Entries, inputs: Inputs) -> list[Layout | None]:
    """Pixtral's tower: a map of the image's own size."""
    cell = base.config.vision_config.patch_size * getattr(base.config, "spatial_merge_size", 1)
    return [(TokenGrid(height // cell, width // cell),) for height, width in inputs["image_sizes"].tolist()]


def square_or_stated_size(base: Model, entries: Entries, inputs: Inputs) -> list[Layout | None]:
    """LLaVA: CLIP's square, or Pixtral's tower."""
    return (square if inputs.get("image_sizes") is None else stated_size)(base, entries, inputs)


def anyres(base: Model, entries: Entries, inputs: Inputs) -> list[Layout | None]:
    """LLaVA-NeXT and -OneVision: a base view, then the unpadded map of the crops with a newline token per row."""
    vision = base.config.vision_config
    side = vision.image_size // vision.patch_size
    layouts: list[Layout | None] = []
    for entry, size in zip(entries, inputs["image_sizes"].tolist(), strict=True):
        rest = len(entry) - side**2
        if rest in (0, 1):
            layouts.append((TokenGrid(side, side, "end" if rest else "none"),))
        else:
            layouts.append((TokenGrid(side, side), _crops(base, size, side, rest)))
    return layouts


def _crops(base: Model, size: Sequence[int], side: int, tokens: int) -> TokenGrid:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    rows, columns = get_anyres_image_grid_shape(
        size, base.config.image_grid_pinpoints, base.config.vision_config.image_size
    )
    height, width = unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), size).shape[1:]
    if height * (width + 1) == tokens:
        return TokenGrid(height, width, "row", side, (rows * side - height) // 2, (columns * side - width) // 2)
    # OneVision shrinks large maps, whose crops are then no whole numbers of tokens.
    most = int(base.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    shrink = (height * width / (most * side**2)) ** 0.5
    return TokenGrid(int(height // shrink), int(width // shrink), "row")


def patches(base: Model, calls: list[torch.Tensor], entries: Entries, inputs: Inputs) -> list[torch.Tensor]:
    """Every patch is a token."""
    return list(torch.cat(calls))


def packed(base: Model, calls: list[torch.Tensor], entries: Entries, inputs: Inputs) -> list[torch.Tensor]:
    """Pixtral's tower: one sequence of all images' patches, merged in squares by Mistral 3."""
    if inputs.get("image_sizes") is None:
        return patches(base, calls, entries, inputs)
    merge = getattr(base.config, "spatial_merge_size", 1)
    sizes = (inputs["image_sizes"] // base.config.vision_config.patch_size).tolist()
    parts = calls[0][0].split([rows * columns for rows, columns in sizes])
    return [
        part.view(rows // merge, merge, columns // merge, merge, -1).mean(dim=(1, 3)).flatten(0, 1)
        for part, (rows, columns) in zip(parts, sizes, strict=True)
    ]


def repacked(base: Model, calls: list[torch.Tensor], entries: Entries, inputs: Inputs) -> list[torch.Tensor]:
    """LLaVA-NeXT and -OneVision: the model's own packing of crops, with zeros for newline tokens."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    values, config, sizes = torch.cat(calls), base.config, inputs["image_sizes"]
    alone = inputs.get("batch_num_images")
    cut = [True] * len(sizes) if alone is None else [count == 1 for count in alone for _ in range(count)]
    counts = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if is_cut else 1
        for size, is_cut in zip(sizes, cut, strict=True)
    ]
    names = {"vision_feature_select_strategy": "default"}
    if config.model_type == "llava_onevision":
        names = {"vision_aspect_ratio": config.vision_aspect_ratio}
    newline = values.new_zeros(values.shape[-1])
    return base.pack_image_features(values.split(counts), sizes, image_newline=newline, **names)[0]


def merged(base: Model, calls: list[torch.Tensor], entries: Entries, inputs: Inputs) -> list[torch.Tensor]:
    """Qwen and GLM: a token's patches stand side by side."""
    values = torch.cat([call[0] for call in calls])
    means = values.view(-1, base.visual.spatial_merge_size**2, values.shape[-1]).mean(dim=1)
    return list(means.split([len(entry) for entry in entries]))


def windowed(base: Model, calls: list[torch.Tensor], entries: Entries, inputs: Inputs) -> list[torch.Tensor]:
    """Qwen2.5: as `merged`, in the order of the tower's windows."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

    tower = base.visual
    index, _ = get_vision_window_index(
        inputs["image_grid_thw"],
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )
    values = torch.cat(merged(base, calls, entries, inputs))[index.argsort().to(calls[0].device)]
    return list(values.split([len(entry) for entry in entries]))


def _shuffled(shuffle: Callable[[Model, torch.Tensor, int], torch.Tensor]) -> Callable[..., list[torch.Tensor]]:
    """A pixel shuffle puts a token's patches side by side in its channels."""

    def to_tokens(base: Model, calls: list[torch.Tensor], entries: Entries, inputs: Inputs) -> list[torch.Tensor]:
        values = torch.cat(calls)
        channels = shuffle(base, values.float(), round(values.shape[1] ** 0.5))
        width = values.shape[-1]
        means = channels.reshape(-1, channels.shape[-1] // width, width).mean(dim=1)
        return list(means.split([len(entry) for entry in entries]))

    return to_tokens


def pooled(base: Model, calls: list[torch.Tensor], entries: Entries, inputs: Inputs) -> list[torch.Tensor]:
    """Gemma 3: the average of squares of the grid."""
    values = torch.cat(calls).float()
    side = round(values.shape[1] ** 0.5)
    grid = values.transpose(1, 2).unflatten(2, (side, side))
    return list(base.multi_modal_projector.avg_pool(grid).flatten(2).transpose(1, 2))


aya_tokens = _shuffled(lambda base, values, side: base.multi_modal_projector.pixel_shuffle(values))
idefics_tokens = _shuffled(lambda base, values, side: base.connector.pixel_shuffle(values, base.config.scale_factor))
internvl_tokens = _shuffled(
    lambda base, values, side: base.pixel_shuffle(values.unflatten(1, (side, side)), base.config.downsample_ratio)
)

FAMILIES: dict[str, Family] = {
    "aya_vision": Family(layouts=square, to_tokens=aya_tokens),
    "cohere2_vision": Family(layouts=square),
    "gemma3": Family("entry", square, pooled),
    "glm46v": Family("entry", grid_thw, merged),
    "glm4v": Family("entry", grid_thw, merged),
    "glm4v_moe": Family("entry", grid_thw, merged),
    "idefics3": Family(layouts=square_tiles, to_tokens=idefics_tokens),
    "internvl": Family(layouts=square, to_tokens=internvl_tokens),
    "llava": Family("entry", square_or_stated_size, packed),
    "llava_next": Family("entry", anyres, repacked),
    "llava_onevision": Family("entry", anyres, repacked),
    "mistral3": Family("entry", stated_size, packed),
    "ovis2": Family(layouts=square),
    "paligemma": Family("entry", square, patches, first_position=1),
    "qwen2_5_vl": Family("entry", grid_thw, windowed),
    "qwen2_vl": Family("entry", grid_thw, merged),
    "qwen3_5": Family("entry", grid_thw, merged),
    "qwen3_vl": Family("entry", grid_thw, merged),
    "qwen3_vl_moe": Family("entry", grid_thw, merged),
    "smolvlm": Family(layouts=square_tiles, to_tokens=idefics_tokens),
    "vipllava": Family("entry", square, patches),
}
"""By ``model.config.model_type``."""


IMPOSSIBLE = {
    "blip-2": "a Q-Former has made 32 tokens of an image already",
    "chameleon": "its images are discrete tokens of the vocabulary",
    "emu3": "its images are discrete tokens of the vocabulary",
    "fuyu": "its decoder reads the encoder's last hidden state, not the features that are handed over",
    "granite4_vision": "its features enter the decoder at several layers, and zeros stand in the prompt",
    "instructblip": "a Q-Former has made 32 tokens of an image already",
    "instructblipvideo": "a Q-Former has made 32 tokens of an image already",
    "llama4": "its decoder reads the encoder's last hidden state, not the features that are handed over",
    "mllama": "its images are read by cross-attention and stand nowhere in the prompt",
}
"""Families that this way of pruning cannot serve, and why."""


def why_not(model_type: str, takes_encoded_images: bool) -> str | None:
    """Why a family cannot be pruned; None if it can.

    ``takes_encoded_images`` says whether its ``forward`` has an argument ``mm_encoder_outputs``.
    """
    if not takes_encoded_images:
        return IMPOSSIBLE.get(model_type, "it does not take encoded images apart from pixels (mm_encoder_outputs)")
    if model_type in FAMILIES:
        return None
    return IMPOSSIBLE.get(model_type, "nobody has tried it: docs/models.md says how to add a family")


def register_family(model_type: str, family: Family) -> None:
    """Make a family of models known by its ``model.config.model_type``; an existing one is replaced."""
    FAMILIES[model_type] = family
