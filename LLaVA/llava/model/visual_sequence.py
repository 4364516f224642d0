"""From crops to the sequence of visual tokens that stands for an image, and from there to what a pruner sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from llava.mm_utils import get_anyres_image_grid_shape
from llava.pruning.base import KeptTokens, Pruner, VisualTokens
from llava.pruning.layout import FeatureMap, Layout, crop_numbers


@dataclass(frozen=True)
class ImageTokens:
    """One image's visual tokens.

    Attributes
    ----------
    features : Tensor (N, D)
        As an unpruned model would see them.
    layout : tuple of FeatureMap, or None
        How they lie on the picture; None where [CLS] is among them.
    notes : dict of str to Tensor (N, ...)
        What a pruner asked of the vision encoder: fields of `VisualTokens`.
    """

    features: torch.Tensor
    layout: Layout | None = None
    notes: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptFacts:
    """What a pruner may know of an image beside its tokens.

    Attributes
    ----------
    key : int or None
        Content digest.
    question : Tensor (T, D) or None
        Embedded text behind the image.
    similarity : Tensor (N,) or None
        Of every token to the question's text.
    """

    key: int | None = None
    question: torch.Tensor | None = None
    similarity: torch.Tensor | None = None


def check_images(images, image_sizes: Sequence | None) -> bool:
    """Whether images may consist of crops, which `image_sizes` is needed for; False for a plain batch (I, 3, H, W).

    Raises
    ------
    ValueError
        If they are not what `LlavaMetaForCausalLM.image_tokens` takes, or there are fewer sizes than images of crops.
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
    """Columns and rows of an anyres image's crops.

    Raises
    ------
    NotImplementedError
        For several crops without anyres.
    ValueError
        Without the image's size (width, height).
    """
    aspect = getattr(config, "image_aspect_ratio", None)
    if aspect != "anyres":
        raise NotImplementedError(f"{crops} crops of an image need image_aspect_ratio 'anyres', not {aspect!r}")
    if size is None:
        raise ValueError("image_sizes is needed to merge the crops of an anyres image")
    return get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tower.config.image_size)


def merge_crops(
    values: torch.Tensor, size: tuple[int, int] | None, grid: tuple[int, int] | None, newline: torch.Tensor | None
) -> torch.Tensor:
    """One image's crops as one sequence: base view, then the map of the other crops row by row.

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

    Returns
    -------
    Tensor (N, C)
    """
    if grid is None:
        return values[0] if newline is None else torch.cat([values[0], newline[None]])
    columns, rows = grid
    side = int(values.shape[1] ** 0.5)
    patches = values[1:].view(rows, columns, side, side, -1)
    if newline is None:
        return torch.cat([values[0], patches.permute(0, 2, 1, 3, 4).flatten(0, 3)])
    patches = patches.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # (C, rows * side, columns * side)
    patches = unpad_image(patches, size)
    ends = newline[:, None, None].expand(*patches.shape[:-1], 1)
    return torch.cat([values[0], torch.cat([patches, ends], dim=-1).flatten(1).T])


def layout_of(
    crops: int, patches: int, size: tuple[int, int] | None, grid: tuple[int, int] | None, spatial: bool, newline: bool
) -> Layout | None:
    """The feature maps behind `merge_crops`' sequence, or behind crops that are simply strung together.

    Parameters
    ----------
    crops, patches : int
        T and P.
    size, grid
        As for `merge_crops`.
    spatial : bool
        Whether the crops were merged into one map.
    newline : bool
        Whether newline vectors were added.
    """
    side = int(patches**0.5)
    if side**2 != patches:
        return None
    base = FeatureMap(side, side)
    if not spatial:
        return (base,) * crops
    if grid is None:
        return (FeatureMap(side, side, "end" if newline else "none"),)
    columns, rows = grid
    if not newline:
        return (base, FeatureMap(rows * side, columns * side, crop_side=side))
    height, width = unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), size).shape[1:]
    if not height:  # of a very wide image, unpadding leaves nothing but the base view
        return (base,)
    top, left = (rows * side - height) // 2, (columns * side - width) // 2
    return (base, FeatureMap(height, width, "row", side, top, left))


def as_visual_tokens(
    features: torch.Tensor,
    k: int,
    images: Sequence[ImageTokens],
    facts: Sequence[PromptFacts],
    alive: torch.Tensor | None = None,
    **seen: torch.Tensor,
) -> VisualTokens:
    """A batch of images with the same number of tokens, as a pruner sees them.

    Parameters
    ----------
    features : Tensor (B, N, D)
    k : int
    images, facts : sequences of B
        Notes and layouts; the layout is handed on where all images have the same.
    alive : Tensor (B, N), int64, optional
        Which of each image's tokens these are, when some are gone already.
    **seen
        Further fields.
    """
    layout = images[0].layout if alive is None and len({image.layout for image in images}) == 1 else None

    def stacked(values: list[torch.Tensor]) -> torch.Tensor:
        whole = torch.stack(values).to(features.device, non_blocking=True)
        return whole if alive is None else whole[torch.arange(len(alive), device=alive.device)[:, None], alive]

    fields = {name: stacked([image.notes[name] for image in images]) for name in images[0].notes}
    if all(image.layout is not None for image in images):
        fields["crops"] = stacked([crop_numbers(image.layout) for image in images])
    if all(fact.similarity is not None for fact in facts):
        fields["text_similarity"] = stacked([fact.similarity for fact in facts])
    keys = tuple(fact.key for fact in facts)
    questions = tuple(None if fact.question is None else fact.question.to(features.device) for fact in facts)
    return VisualTokens(
        features=features,
        k=k,
        layout=layout,
        image_keys=None if None in keys else keys,
        question=None if any(question is None for question in questions) else questions,
        **fields,
        **seen,
    )


def reduce_images(
    pruner: Pruner, images: Sequence[ImageTokens], facts: Sequence[PromptFacts], fraction: float
) -> list[KeptTokens]:
    """Drop visual tokens of each image: features (N_i, D) -> (k_i, D), and where they stood.

    Images with the same number of tokens and the same layout are reduced in one batch; each image's choice is its own.
    """
    groups: dict[object, list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(number if pruner.varies else (len(image.features), image.layout), []).append(number)
    kept: dict[int, KeptTokens] = {}
    for members in groups.values():
        features = torch.stack([images[i].features for i in members])
        k = pruner.budget(features.shape[1], fraction)
        batch = as_visual_tokens(features, k, [images[i] for i in members], [facts[i] for i in members])
        left = pruner.reduce(batch)
        for number, tokens, indices in zip(members, left.features, left.indices, strict=True):
            kept[number] = KeptTokens(tokens, indices)
    return [kept[number] for number in range(len(images))]
