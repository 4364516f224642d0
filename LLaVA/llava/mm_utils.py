"""From images and prompts to what the model takes: pixel values and token ids."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.images import (
    REDUCING_GAP,
    expand2square,
    load_image,
    load_image_from_base64,
    load_rgb,
    pad_to_square,
)

__all__ = [
    "AnswerEnd",
    "KeywordsStoppingCriteria",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "images_to",
    "load_image",
    "load_image_from_base64",
    "load_rgb",
    "process_anyres_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]

# Above this ratio of the sides, the resize to a given shorter side would make hundreds of megabytes of pixels, of
# which the centre crop keeps a few columns. No photograph comes near it.
MAX_SIDE_RATIO = 256


def select_best_resolution(
    original_size: tuple[int, int], possible_resolutions: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """The candidate that keeps most of an image's pixels and, among equals, wastes least; the first one on a tie.

    Parameters
    ----------
    original_size : (int, int)
        Width and height of the image.
    possible_resolutions : sequence of (int, int)
        Widths and heights to choose from.

    Returns
    -------
    (int, int) or None
        None if there is nothing to choose from.
    """
    candidates = [(width, height) for width, height in possible_resolutions]
    return max(candidates, key=partial(_fit, original_size)) if candidates else None


def _fit(size: tuple[int, int], resolution: tuple[int, int]) -> tuple[int, int]:
    """Pixels of an image that a resolution keeps, and, negative, those that it wastes."""
    (width, height), (across, down) = size, resolution
    scale = min(across / width, down / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - across * down


def resize_and_pad_image(image: Image.Image, target_resolution: tuple[int, int]) -> Image.Image:
    """Fit an image into a rectangle without changing its aspect ratio, centred on black.

    Parameters
    ----------
    image : PIL.Image.Image
    target_resolution : (int, int)
        Width and height of the result.

    Returns
    -------
    PIL.Image.Image
        Mode "RGB".
    """
    width, height = image.size
    target_width, target_height = target_resolution
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        size = (target_width, min(math.ceil(height * scale_width), target_height))
    else:
        size = (min(math.ceil(width * scale_height), target_width), target_height)
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(
        image.resize(size, reducing_gap=REDUCING_GAP), ((target_width - size[0]) // 2, (target_height - size[1]) // 2)
    )
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut an image into squares, row by row; what a square has beyond the right and lower edge is black."""
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, image.height, patch_size)
        for left in range(0, image.width, patch_size)
    ]


def _pinpoints(grid_pinpoints: str | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """A checkpoint's list of resolutions, which may be written as a string in its configuration."""
    try:
        values = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
        pairs = [(int(width), int(height)) for width, height in values]
    except (SyntaxError, TypeError, ValueError):
        pairs = []
    if not pairs:
        raise ValueError(
            f"image_grid_pinpoints must be a list of (width, height) pairs or that list as text, got {grid_pinpoints!r}"
        )
    return pairs


def get_anyres_image_grid_shape(
    image_size: tuple[int, int], grid_pinpoints: str | Sequence[tuple[int, int]], patch_size: int
) -> tuple[int, int]:
    """Number of crops across and down that an anyres checkpoint cuts an image into.

    Parameters
    ----------
    image_size : (int, int)
        Width and height of the image.
    grid_pinpoints : sequence of (int, int), or str
        The resolutions to choose from.
    patch_size : int
        Side of a crop in pixels.
    """
    width, height = max(_pinpoints(grid_pinpoints), key=partial(_fit, image_size))
    return width // patch_size, height // patch_size


def process_anyres_image(
    image: Image.Image, processor: Any, grid_pinpoints: str | Sequence[tuple[int, int]]
) -> torch.Tensor:
    """The base view and the crops of an image (LLaVA-1.6).

    Parameters
    ----------
    image : PIL.Image.Image
        Of any mode; brought to RGB by :func:`load_rgb`.
    processor
        A CLIP image processor.
    grid_pinpoints : sequence of (int, int), or str
        The resolutions to choose from, multiples of the crop size.

    Returns
    -------
    torch.Tensor
        (1 + crops, 3, s, s) float32. The base view is the whole image squeezed to a square; the crops, row by row,
        are the image fitted into the best resolution.
    """
    image = load_rgb(image)
    best = max(_pinpoints(grid_pinpoints), key=partial(_fit, image.size))
    crops = divide_to_patches(resize_and_pad_image(image, best), processor.crop_size["height"])
    side = processor.size["shortest_edge"]
    views = [image.resize((side, side), reducing_gap=REDUCING_GAP), *crops]
    return torch.stack([_preprocess(processor, view) for view in views])


def _preprocess(processor: Any, image: Image.Image) -> torch.Tensor:
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def _crop_to_side_ratio(image: Image.Image) -> Image.Image:
    """The middle of an extremely long image: all of it that a centre crop can show, and more."""
    shorter, longer = sorted(image.size)
    if longer <= MAX_SIDE_RATIO * shorter:
        return image
    kept = MAX_SIDE_RATIO * shorter
    # The same centre to the pixel needs the same parity.
    kept -= (longer - kept) % 2
    start = (longer - kept) // 2
    box = (0, start, shorter, start + kept) if image.height > image.width else (start, 0, start + kept, shorter)
    return image.crop(box)


def process_images(
    images: Sequence[Image.Image] | Image.Image, image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Turn images into pixel values the way a checkpoint was trained on them.

    Parameters
    ----------
    images : sequence of PIL.Image.Image
        Of any mode; each is brought to RGB by :func:`load_rgb`. A single image counts as a sequence of one.
    image_processor
        A CLIP image processor.
    model_cfg
        Read are ``image_aspect_ratio`` ("pad": to a square filled with the processor's mean colour; "anyres": base
        view and crops; anything else: shorter side resized, then centre crop) and, for "anyres",
        ``image_grid_pinpoints``.

    Returns
    -------
    torch.Tensor or list of torch.Tensor
        float32. (N, 3, s, s), or (N, crops, 3, s, s) for "anyres"; a list of N tensors where their shapes differ.

    Raises
    ------
    ValueError
        If there is no image, or one that cannot be decoded.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if len(images) == 0:
        raise ValueError("process_images needs at least one image, got none")
    images = [load_rgb(image) for image in images]
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    if aspect_ratio == "pad":
        colour = tuple(int(mean * 255) for mean in image_processor.image_mean)
        side = image_processor.size["shortest_edge"]
        pixels = [_preprocess(image_processor, pad_to_square(image, colour, side)) for image in images]
    elif aspect_ratio == "anyres":
        pixels = [process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints) for image in images]
    else:
        images = [_crop_to_side_ratio(image) for image in images]
        return image_processor(images, return_tensors="pt")["pixel_values"]
    if all(one.shape == pixels[0].shape for one in pixels):
        return torch.stack(pixels)
    return pixels


def images_to(
    images: torch.Tensor | list[torch.Tensor], device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor | list[torch.Tensor]:
    """Move what :func:`process_images` returned, tensor or list, to a device and a dtype."""
    if isinstance(images, list):
        return [image.to(device=device, dtype=dtype) for image in images]
    return images.to(device=device, dtype=dtype)


@overload
def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = ..., return_tensors: None = None
) -> list[int]: ...


@overload
def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = ..., *, return_tensors: str
) -> torch.Tensor: ...


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Token ids of a prompt, with ``image_token_index`` in place of every ``<image>``.

    Each piece of text between two marks is encoded as a text of its own, so with SentencePiece it begins with a
    dummy space; the checkpoints were trained on exactly this.

    Parameters
    ----------
    prompt : str
    tokenizer
    image_token_index : int
    return_tensors : {None, "pt"}
        "pt" for a tensor (T,) int64 instead of a list.

    Raises
    ------
    ValueError
        If ``return_tensors`` is anything else.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"Unsupported tensor type: {return_tensors}")
    pieces = [tokenizer(piece).input_ids for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
    has_bos = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    input_ids = [tokenizer.bos_token_id] if has_bos else []
    for index, piece in enumerate(pieces):
        if index > 0:
            input_ids.append(image_token_index)
        input_ids.extend(piece[has_bos:])
    return input_ids if return_tensors is None else torch.tensor(input_ids, dtype=torch.long)


def get_model_name_from_path(model_path: str) -> str:
    """Last component of a path or Hub id; for a training run's ``checkpoint-N`` folder, together with its parent.

    Raises
    ------
    IndexError
        If the path is a ``checkpoint-N`` folder without a parent.
    """
    parts = model_path.strip("/").split("/")
    if not parts[-1].startswith("checkpoint-"):
        return parts[-1]
    if len(parts) == 1:
        raise IndexError(f"{model_path!r} has no parent folder to take the model's name from")
    return f"{parts[-2]}_{parts[-1]}"


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop generation when a keyword has been written.

    A row has stopped if it ends with the token ids of a keyword, or if the text of its last few new tokens contains
    one. When ``generate`` runs on embeddings, as it does with images, the ids it hands over do not contain the
    prompt; this is noticed by their being shorter than the prompt.

    Parameters
    ----------
    keywords : list of str
    tokenizer
    input_ids : torch.Tensor
        (B, T) prompt; only its length is used.
    per_row : bool
        What calling the object returns: a Python bool, True when all rows have stopped (as in the original), or, if
        ``per_row``, a bool tensor (B,) with which ``generate`` ends each row on its own.
    """

    def __init__(self, keywords: list[str], tokenizer: Any, input_ids: torch.Tensor, per_row: bool = False) -> None:
        self.keywords = keywords
        self.keyword_ids = []
        for keyword in keywords:
            ids = tokenizer(keyword).input_ids
            if len(ids) > 1 and ids[0] == tokenizer.bos_token_id:
                ids = ids[1:]
            self.keyword_ids.append(torch.tensor(ids))
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        self.per_row = per_row
        self._output_has_prompt = True

    def call_for_batch(self, output_ids: torch.LongTensor, scores: torch.FloatTensor | None, **kwargs: Any) -> bool:
        """Whether a single row, (1, T), has stopped."""
        row = output_ids[0]
        if len(row) < self.start_len:
            self._output_has_prompt = False
        for ids in self.keyword_ids:
            if row[-len(ids) :].tolist() == ids.tolist():
                return True
        new_tokens = len(row) - (self.start_len if self._output_has_prompt else 0)
        tail = row[-min(new_tokens, self.max_keyword_len) :]
        # Image marks are no token ids and cannot be decoded.
        text = self.tokenizer.decode(tail[tail >= 0], skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)

    def __call__(
        self, output_ids: torch.LongTensor, scores: torch.FloatTensor | None = None, **kwargs: Any
    ) -> bool | torch.Tensor:
        """Whether generation is to stop.

        Parameters
        ----------
        output_ids : torch.Tensor
            (B, T) ids generated so far, with or without the prompt in front.
        scores : torch.Tensor, optional
            Not used.
        """
        rows = [self.call_for_batch(row.unsqueeze(0), scores) for row in output_ids]
        return torch.tensor(rows, device=output_ids.device) if self.per_row else all(rows)


@dataclass(frozen=True)
class AnswerEnd:
    """Ends answers where the template says so: a v0 checkpoint writes ``###`` and goes on with a turn of the user's.

    Attributes
    ----------
    text : str
        What ends an answer; empty where the tokenizer's end-of-text token does, with which generation stops by itself.
    tokenizer
    """

    text: str
    tokenizer: Any

    @classmethod
    def of(cls, conversation: Conversation, tokenizer: Any) -> AnswerEnd:
        """The end that a template prescribes."""
        text = conversation.turn_end
        return cls("" if text == tokenizer.eos_token else text, tokenizer)

    def options(self, input_ids: torch.Tensor) -> dict[str, StoppingCriteriaList]:
        """Arguments of ``generate`` with which each row of the prompts (B, T) stops there."""
        if not self.text:
            return {}
        criteria = KeywordsStoppingCriteria([self.text], self.tokenizer, input_ids, per_row=True)
        return {"stopping_criteria": StoppingCriteriaList([criteria])}

    def cut(self, answer: str) -> str:
        """The answer up to its end."""
        return answer.partition(self.text)[0].strip() if self.text else answer
