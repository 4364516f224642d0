"""From pictures and prompts to what the model takes: pixel values and token ids."""

from __future__ import annotations

import ast
import base64
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

# Above this ratio of the sides, the resize to a given shorter side would make hundreds of megabytes of pixels, of
# which the centre crop keeps a few columns. No photograph comes near it.
MAX_SIDE_RATIO = 256
# Seconds to connect, and seconds to wait for the next bytes.
DOWNLOAD_TIMEOUT = (10, 60)


def load_rgb(source: Image.Image | str | os.PathLike | BinaryIO, name: str | None = None) -> Image.Image:
    """Read a picture, decode it completely and bring it to 8-bit RGB.

    Transparency is dropped, not blended; a palette is looked up; 16-bit grey keeps its high byte (Pillow by itself
    would clip it to white); 32-bit integers count as 16-bit grey unless none is above 255; of an animation the
    current frame is taken, which is the first one of a newly opened file. Orientation marks in EXIF data are not
    followed, as in the original LLaVA.

    Parameters
    ----------
    source : PIL.Image.Image, path or binary file
        An RGB image that is already decoded is returned as it is. A file is refused when it is cut off; an image
        that somebody else opened follows the process's Pillow setting for that (lmms-eval accepts cut-off pictures,
        because published data sets hold some).
    name : str, optional
        What error messages call the picture; the path or the image's format and size by default.

    Returns
    -------
    PIL.Image.Image
        Mode "RGB", decoded.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If there is no such file.
    ValueError
        If the content is no picture, is cut off or damaged, is unreasonably large, or holds numbers that have no
        defined brightness (floating point, or integers outside 0..65535).
    TypeError
        If ``source`` is none of the above.
    """
    opened_here = not isinstance(source, Image.Image)
    if opened_here:
        image, name = _open_image(source, name)
    else:
        image = source
        name = name or f"the {image.width}x{image.height} {image.format or image.mode} image"
    try:
        with _strict_decoding() if opened_here else nullcontext():
            image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name} is truncated or damaged: {error}") from error
    if image.mode.startswith("I"):
        return _grey_from_integers(image, name)
    if image.mode == "F":
        raise ValueError(
            f"{name} holds floating-point numbers, which have no defined brightness; convert it to 8 or 16 bits first"
        )
    if image.mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has mode {image.mode!r}, which cannot be converted to RGB: {error}") from error


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Have Pillow refuse cut-off files inside the block, whatever another package told it for the whole process."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _open_image(source: str | os.PathLike | BinaryIO, name: str | None) -> tuple[Image.Image, str]:
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
        raise TypeError(f"expected a PIL image, a path or a binary file, got {type(source).__name__}")
    name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the image")
    try:
        return Image.open(source), name
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image file {name} does not exist") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"image file {name} is a folder") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture in a format that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error}") from error
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        if getattr(error, "errno", None) is not None:  # the system's own words, with the path: no permission, ...
            raise
        raise ValueError(f"{name} is truncated or damaged: {error}") from error


def _grey_from_integers(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"{name} holds integers from {low} to {high}; allowed: 0 to 65535 (16 bits)")
    if image.mode != "I" or high > 255:
        values >>= 8
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def load_image(image_file: str) -> Image.Image:
    """Read a picture from a file or from the web, as :func:`load_rgb` does.

    Parameters
    ----------
    image_file : str
        A path, or an address that begins with ``http://`` or ``https://``.

    Raises
    ------
    OSError
        If the file does not exist or the address cannot be fetched.
    ValueError
        If what was read is not a sound picture.
    """
    if not image_file.startswith(("http://", "https://")):
        return load_rgb(image_file)
    # Only needed here: importing the package must not need the web.
    import requests

    try:
        response = requests.get(image_file, timeout=DOWNLOAD_TIMEOUT)
        response.raise_for_status()
    except requests.RequestException as error:
        raise OSError(f"could not fetch {image_file}: {error}") from error
    return load_rgb(BytesIO(response.content), name=image_file)


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Open a picture that was sent as base64 text; its mode is left as it is."""
    return Image.open(BytesIO(base64.b64decode(image)))


def expand2square(pil_img: Image.Image, background_color: int | tuple[int, ...]) -> Image.Image:
    """Centre a picture on a square canvas of its own mode; a square picture is returned as it is.

    Parameters
    ----------
    pil_img : PIL.Image.Image
    background_color : int or tuple of int
        One number per channel.
    """
    if pil_img.width == pil_img.height:
        return pil_img
    side = max(pil_img.size)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - pil_img.width) // 2, (side - pil_img.height) // 2))
    return square


def select_best_resolution(
    original_size: tuple[int, int], possible_resolutions: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """The candidate that keeps most of a picture's pixels and, among equals, wastes least; the first one on a tie.

    Parameters
    ----------
    original_size : (int, int)
        Width and height of the picture.
    possible_resolutions : sequence of (int, int)
        Widths and heights to choose from.

    Returns
    -------
    (int, int) or None
        None if there is nothing to choose from.
    """
    width, height = original_size
    best, best_key = None, None
    for candidate_width, candidate_height in possible_resolutions:
        scale = min(candidate_width / width, candidate_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        key = (effective, effective - candidate_width * candidate_height)
        if best_key is None or key > best_key:
            best, best_key = (candidate_width, candidate_height), key
    return best


def resize_and_pad_image(image: Image.Image, target_resolution: tuple[int, int]) -> Image.Image:
    """Fit a picture into a rectangle without changing its aspect ratio, centred on black.

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
    canvas.paste(image.resize(size), ((target_width - size[0]) // 2, (target_height - size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut a picture into squares, row by row; what a square has beyond the right and lower edge is black."""
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
    """Number of crops across and down that an anyres checkpoint cuts a picture into.

    Parameters
    ----------
    image_size : (int, int)
        Width and height of the picture.
    grid_pinpoints : sequence of (int, int), or str
        The resolutions to choose from.
    patch_size : int
        Side of a crop in pixels.
    """
    width, height = select_best_resolution(image_size, _pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


def process_anyres_image(
    image: Image.Image, processor: Any, grid_pinpoints: str | Sequence[tuple[int, int]]
) -> torch.Tensor:
    """The base view and the crops of a picture (LLaVA-1.6).

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
        (1 + crops, 3, s, s) float32. The base view is the whole picture squeezed to a square; the crops, row by row,
        are the picture fitted into the best resolution.
    """
    image = load_rgb(image)
    best = select_best_resolution(image.size, _pinpoints(grid_pinpoints))
    crops = divide_to_patches(resize_and_pad_image(image, best), processor.crop_size["height"])
    side = processor.size["shortest_edge"]
    views = [image.resize((side, side)), *crops]
    return torch.stack([_preprocess(processor, view) for view in views])


def _preprocess(processor: Any, image: Image.Image) -> torch.Tensor:
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def _crop_to_side_ratio(image: Image.Image) -> Image.Image:
    """The middle of an extremely long picture: all of it that a centre crop can show, and more."""
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
    """Turn pictures into pixel values the way a checkpoint was trained on them.

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
        pixels = [_preprocess(image_processor, expand2square(image, colour)) for image in images]
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
    ) -> bool | torch.BoolTensor:
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
