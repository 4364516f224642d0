"""From pixels to each image's visual tokens: encode its crops, and join them as the language model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from llava.model.multimodal_encoder.observations import FEATURES, Output, encoder_outputs
from llava.model.offload import execution_device, parameter_here
from llava.model.prompt import question_after_image
from llava.model.visual_cache import content_keys
from llava.pruning.base import Pruner
from llava.pruning.own_budget import NO_PATCH, patch_ids, patch_rows
from llava.pruning.signals import SIGNALS
from llava.pruning.tokens import ImageTokens, Layout, TokenGrid


def image_tokens(
    model: Any, images: Any, image_sizes: Sequence | None, pruner: Pruner | None = None
) -> list[ImageTokens]:
    """Every image's visual tokens, with layout and the signals of images that a method asks for.

    Parameters
    ----------
    model : LlavaMetaForCausalLM
    images : Tensor (I, 3, H, W) or (I, T, 3, H, W), or list of Tensor (3, H, W) or (T, 3, H, W)
        Normalised pixels; T crops an image.
    image_sizes : list of (width, height), optional
        Original sizes, needed to merge crops.
    pruner : Pruner, optional

    Raises
    ------
    ValueError
        See `check_images`; or for an unknown ``mm_patch_merge_type``.
    NotImplementedError
        For several crops of an image without anyres.
    """
    if check_images(images, image_sizes):
        crops = [image.unsqueeze(0) if image.ndim == 3 else image for image in images]  # (T_i, 3, H, W) each
        features, signals = encode(model, torch.cat(crops), pruner)
        counts = [len(image) for image in crops]
        sizes = image_sizes if image_sizes is not None else [None] * len(crops)
        split = {name: values.split(counts) for name, values in signals.items()}
        tokens = [
            join_crops(model, row, {name: values[i] for name, values in split.items()}, size)
            for i, (row, size) in enumerate(zip(features.split(counts), sizes, strict=False))
        ]
    else:
        features, signals = encode(model, images, pruner)
        layout = token_grid(1, features.shape[1], None, None, spatial=False, newline=False)
        tokens = [
            ImageTokens(row, layout, {name: values[i] for name, values in signals.items()})
            for i, row in enumerate(features)
        ]
    if pruner is not None and "image_keys" in pruner.needs:
        for one, key in zip(tokens, content_keys(images), strict=True):
            one.signals["image_keys"] = key
    return tokens


def tokens_in_prompts(
    model: Any,
    images: Any,
    image_sizes: Sequence | None,
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    images_of_rows: Sequence[Sequence[int]],
) -> list[ImageTokens]:
    """`image_tokens` of the images that stand in prompts, in the order of their marks, with the prompts' signals.

    ``rows`` are ids (T,) and labels (T,) on the host, ``images_of_rows`` which of ``images`` stand in each.
    """
    numbers = [number for own in images_of_rows for number in own]
    if not numbers:
        return []
    if len(numbers) < len(images):
        chosen = [images[number] for number in numbers]
        # An index would be brought to the GPU first.
        images = torch.stack(chosen) if isinstance(images, torch.Tensor) else chosen
        image_sizes = None if image_sizes is None else [image_sizes[number] for number in numbers]
    active = model.active_pruner
    tokens = image_tokens(model, images, image_sizes, active.pruner)
    if active.needs("question") or active.needs("text_similarity"):
        asked = [question_after_image(*row) for row, own in zip(rows, images_of_rows, strict=True) for _ in own]
        for image, question in zip(tokens, asked, strict=True):
            if active.needs("question"):
                ids = question.to(image.features.device, non_blocking=True)
                image.signals["question"] = model.get_model().embed_tokens(ids)
            if active.needs("text_similarity"):
                image.signals["text_similarity"] = similarity_to(model, image, question)
    return tokens


def similarity_to(model: Any, image: ImageTokens, question: torch.Tensor) -> torch.Tensor:
    """Each token's similarity (N,) to the ids of a question (T,) in CLIP's common space; newlines get the mean."""
    from llava.model.multimodal_encoder.clip_text import question_text

    clip = model.get_vision_tower().clip_text
    if model.prompt_tokenizer is None:
        raise ValueError("the model has no prompt_tokenizer to read the question with: use load_pretrained_model")
    text = question_text(model.prompt_tokenizer.decode(question, skip_special_tokens=True))
    similarity = clip.similarity(image.signals["encoder_features"][None], text)[0]
    if image.layout is not None:
        newlines = torch.cat([part.is_newline() for part in image.layout])
        newlines = newlines.to(similarity.device, non_blocking=True)
        similarity = similarity.masked_fill(newlines, similarity[~newlines].mean())
    return similarity


def tokens_of_an_image(model: Any) -> int | None:
    """Visual tokens of every image of a model; None where that depends on the image, or there is no tower."""
    tower = model.get_vision_tower()
    if tower is None or getattr(model.config, "image_aspect_ratio", None) == "anyres":
        return None
    return tower.num_patches + (tower.select_feature == "cls_patch")


def encode(model: Any, pixels: torch.Tensor, pruner: Pruner | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Projected features (B, N, D) of images or crops (B, 3, H, W), and the encoder's signals {name: (B, N, ...)}."""
    tower, needs = model.get_vision_tower(), encoder_outputs(pruner)
    wanted = dict.fromkeys(output for outputs in needs.values() for output in outputs)
    signals = {"patch_ids": patches_of(tower, pixels)} if pruner is not None and pruner.drop_duplicates else {}
    cache = None if torch.is_grad_enabled() else model.visual_cache
    if cache is None and not wanted:
        return model.encode_images(pixels), signals
    projector, projected = model.get_model().mm_projector, cache is not None and cache.holds_projected

    def run(pixels: torch.Tensor) -> dict[Output, torch.Tensor]:
        every = wanted if cache is None else wanted | dict.fromkeys(cache.expected)
        features, outputs = tower.observe(pixels, every) if every else (tower(pixels), {})
        return {FEATURES: project(projector, features) if projected else features, **outputs}

    found = run(pixels) if cache is None else cache.outputs(pixels, (FEATURES, *wanted), run)
    signals |= {
        need: torch.stack([found[output] for output in outputs], -1) if SIGNALS[need].per_layer else found[outputs[0]]
        for need, outputs in needs.items()
    }
    return found[FEATURES] if projected else project(projector, found[FEATURES]), signals


def patches_of(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The signal ``patch_ids`` (B, N) of images or crops (B, 3, H, W), whose ids are comparable."""
    ids = patch_ids(patch_rows(pixels, tower.config.patch_size))
    return F.pad(ids, (1, 0), value=NO_PATCH) if tower.select_feature == "cls_patch" else ids


def project(projector: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    """The vision tower's features (B, N, C) as the language model reads them: (B, N, D), in the projector's dtype."""
    weight = next(projector.parameters(), None)
    if weight is not None:
        features = features.to(device=execution_device(projector), dtype=weight.dtype)
    return projector(features)


def join_crops(
    model: Any, features: torch.Tensor, signals: dict[str, torch.Tensor], size: tuple[int, int] | None
) -> ImageTokens:
    """One image's T crops as one sequence: features (T, P, D) and signals (T, P, ...), by ``mm_patch_merge_type``."""
    crops, patches, _ = features.shape
    merge_type = getattr(model.config, "mm_patch_merge_type", "flat")
    if merge_type == "flat":
        flat = {name: values.flatten(0, 1) for name, values in signals.items()}
        return ImageTokens(features.flatten(0, 1), token_grid(crops, patches, None, None, False, False), flat)
    if not merge_type.startswith("spatial"):
        raise ValueError(f"Unexpected mm_patch_merge_type: {merge_type}")
    newline = parameter_here(model.get_model(), "image_newline").to(features) if "unpad" in merge_type else None
    grid = None if crops == 1 else crop_grid(crops, size, model.config, model.get_vision_tower())

    def merged(values: torch.Tensor) -> torch.Tensor:
        columns = values if values.ndim == 3 else values.unsqueeze(-1)  # (T, P, C)
        zeros = None if newline is None else columns.new_zeros(columns.shape[-1])
        joined = merge_crops(columns, size, grid, zeros)
        return joined if values.ndim == 3 else joined.squeeze(-1)

    return ImageTokens(
        merge_crops(features, size, grid, newline),
        token_grid(crops, patches, size, grid, spatial=True, newline=newline is not None),
        {name: merged(values) for name, values in signals.items()},
    )


def check_images(images, image_sizes: Sequence | None) -> bool:
    """Whether images may consist of crops, which `image_sizes` is needed for; False for a plain batch (I, 3, H, W).

    A `ValueError` if they are not what `image_tokens` takes, or there are fewer sizes than images of crops.
    """
    allowed = "a tensor (I, 3, H, W) or (I, T, 3, H, W), or a list of (3, H, W) or (T, 3, H, W)"
    if isinstance(images, torch.Tensor):
        if images.ndim not in (4, 5):
            hint = ": one image is images[None]" if images.ndim == 3 else ""
            raise ValueError(f"images must be {allowed}, not a tensor {tuple(images.shape)}{hint}")
        if images.ndim == 4:
            return False
    else:
        for number, image in enumerate(images):
            found = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            if not isinstance(found, tuple) or len(found) not in (3, 4):
                raise ValueError(f"images must be {allowed}; image {number} is {found}")
    if image_sizes is not None and len(image_sizes) < len(images):
        raise ValueError(f"image_sizes holds {len(image_sizes)} sizes (width, height), but {len(images)} images came")
    return True


def unpad_image(tensor: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
    """Cut the bars off a feature map (C, h, w) that stands for an image of ``original_size`` (width, height)."""
    width, height = original_size
    map_height, map_width = tensor.shape[1:]
    if width / height > map_width / map_height:
        content = int(height * (map_width / width))
        bar = (map_height - content) // 2
        return tensor[:, bar : map_height - bar, :]
    content = int(width * (map_height / height))
    bar = (map_width - content) // 2
    return tensor[:, :, bar : map_width - bar]


def crop_grid(crops: int, size: tuple[int, int] | None, config, tower) -> tuple[int, int]:
    """Columns and rows of an anyres image's crops, by its size (width, height).

    A `NotImplementedError` for several crops without anyres, a `ValueError` without the size.
    """
    aspect = getattr(config, "image_aspect_ratio", None)
    if aspect != "anyres":
        raise NotImplementedError(f"{crops} crops of an image need image_aspect_ratio 'anyres', not {aspect!r}")
    if size is None:
        raise ValueError("image_sizes is needed to merge the crops of an anyres image")
    from llava.mm_utils import get_anyres_image_grid_shape

    return get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tower.config.image_size)


def merge_crops(
    values: torch.Tensor, size: tuple[int, int] | None, grid: tuple[int, int] | None, newline: torch.Tensor | None
) -> torch.Tensor:
    """One image's crops as one sequence (N, C): base view, then the map of the other crops row by row.

    Parameters
    ----------
    values : Tensor (T, P, C)
        Features, or anything else that each of the P patches of T crops has.
    size : (width, height)
        Of the image; used where padding is cut off.
    grid : (columns, rows)
        Of the crops; None for a base view alone.
    newline : Tensor (C,), or None
        Ends every row of the map (or a base view alone); with it, rows and columns of padding are cut off.
    """
    if grid is None:
        return values[0] if newline is None else torch.cat([values[0], newline[None]])
    columns, rows = grid
    side = int(values.shape[1] ** 0.5)
    patches = values[1:].view(rows, columns, side, side, -1)
    if newline is None:
        return torch.cat([values[0], patches.permute(0, 2, 1, 3, 4).flatten(0, 3)])
    patches = patches.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # (C, rows * side, columns * side)
    assert size is not None  # `crop_grid` refuses crops without it
    patches = unpad_image(patches, size)
    ends = newline[:, None, None].expand(*patches.shape[:-1], 1)
    return torch.cat([values[0], torch.cat([patches, ends], dim=-1).flatten(1).T])


def token_grid(
    crops: int, patches: int, size: tuple[int, int] | None, grid: tuple[int, int] | None, spatial: bool, newline: bool
) -> Layout | None:
    """How `merge_crops`' sequence of T ``crops`` of P ``patches`` lies on the image.

    With ``spatial`` the crops were merged into one map, with newline vectors or without; otherwise they are simply
    strung together. None where the patches are no square.
    """
    side = int(patches**0.5)
    if side**2 != patches:
        return None
    base = TokenGrid(side, side)
    if not spatial:
        return (base,) * crops
    if grid is None:
        return (TokenGrid(side, side, "end" if newline else "none"),)
    columns, rows = grid
    if not newline:
        return (base, TokenGrid(rows * side, columns * side, crop_side=side))
    assert size is not None
    height, width = unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), size).shape[1:]
    if not height:  # of a very wide image, unpadding leaves nothing but the base view
        return (base,)
    top, left = (rows * side - height) // 2, (columns * side - width) // 2
    return (base, TokenGrid(height, width, "row", side, top, left))
