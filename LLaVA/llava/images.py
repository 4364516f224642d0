"""Reads images from files and the web as RGB, within limits of memory and time, and pads them to a square."""

from __future__ import annotations

import base64
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from queue import Empty, SimpleQueue
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

__all__ = [
    "expand2square",
    "load_image",
    "load_image_from_base64",
    "load_rgb",
    "open_image",
    "pad_to_square",
]

MAX_DOWNLOAD = 128 * 2**20
"""Bytes of an image from the web."""
DOWNLOAD_SECONDS = 60
"""For the whole download, redirects included."""
SILENCE_SECONDS = (10, 30)
"""Time limits to connect, and between two bytes."""
MAX_PADDING = 2**25
"""Pixels (128 MiB) that padding to a square may add; beyond, the image is resized first."""
ROWS_AT_ONCE = 1024
"""To limit memory during padding and resizing."""
REDUCING_GAP = 64.0
"""Of Pillow's resize: a side at least 128 times too long is first reduced by a whole number."""


def load_rgb(
    source: Image.Image | str | os.PathLike | BinaryIO, name: str | None = None, upright: bool = True
) -> Image.Image:
    """Read an image, decode it completely and bring it to 8-bit RGB.

    Transparency is dropped, not blended; a palette is looked up; 16-bit grey keeps its high byte (Pillow by itself
    would clip it to white); 32-bit integers count as 16-bit grey unless none is above 255; of an animation the
    current frame is taken, which is the first one of a newly opened file.

    Parameters
    ----------
    source : PIL.Image.Image, path or binary file
        An RGB image that is already decoded is returned as it is. A truncated file is refused; an image that the
        caller opened follows Pillow's process-wide setting (lmms-eval accepts truncated images, because published
        data sets contain some).
    name : str, optional
        Name of the image in error messages; default: its path, or its format and size.
    upright : bool
        Apply the EXIF orientation of a file; the original LLaVA ignores it. A `PIL.Image.Image` is never turned,
        because its size may be known elsewhere already.

    Returns
    -------
    PIL.Image.Image
        Mode "RGB", decoded.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If there is no such file.
    ValueError
        If the content is not an image, is truncated or damaged, has more pixels than Pillow allows, or has values of
        undefined brightness (floating point, or integers outside 0..65535).
    TypeError
        If ``source`` is of another type.
    """
    if isinstance(source, Image.Image):
        image = source
        name = name or f"the {image.width}x{image.height} {image.format or image.mode} image"
        _decode(image, name)
    else:
        name = name or _name(source)
        image = _read(source, name, upright)
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


def _name(source: object) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the image"


def _read(source: str | os.PathLike | BinaryIO, name: str, upright: bool) -> Image.Image:
    """A file's image, decoded, in its own mode."""
    image = open_image(source, name)
    with _strict_decoding():
        _decode(image, name)
    if not upright:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata raises errors of any kind
        return image


def _decode(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name} is truncated or damaged: {error}") from error


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Let Pillow refuse truncated files inside the block, whatever another package has set for the process."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_image(source: str | os.PathLike | BinaryIO, name: str | None = None) -> Image.Image:
    """Open an image file without decoding its pixels; arguments and errors as of `load_rgb`."""
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
        raise TypeError(f"expected a PIL image, a path or a binary file, got {type(source).__name__}")
    name = name or _name(source)
    try:
        return Image.open(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image file {name} does not exist") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"image file {name} is a folder") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image in a format that Pillow can read") from error
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


def load_image(image_file: str, upright: bool = True) -> Image.Image:
    """Read an image from a file or from the web, as `load_rgb` does.

    Parameters
    ----------
    image_file : str
        A path, or an address that begins with ``http://`` or ``https://``.
    upright : bool
        Apply the EXIF orientation, which the original LLaVA ignores.

    Raises
    ------
    OSError
        If the file does not exist, or the address cannot be fetched within `DOWNLOAD_SECONDS` and `MAX_DOWNLOAD`.
    ValueError
        If the content is not a valid image.
    """
    if not image_file.startswith(("http://", "https://")):
        return load_rgb(image_file, upright=upright)
    return load_rgb(_download(image_file), image_file, upright)


def _download(address: str) -> BytesIO:
    """The content at an address.

    The timeout of requests only limits pauses between bytes. A thread limits the whole download; it stops once nobody
    waits for it.
    """
    answer: SimpleQueue[BytesIO | Exception] = SimpleQueue()
    given_up = threading.Event()

    def fetch() -> None:
        try:
            answer.put(_fetched(address, given_up))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=fetch, daemon=True).start()
    try:
        found = answer.get(timeout=DOWNLOAD_SECONDS)
    except Empty:
        found = TimeoutError(f"not finished after {DOWNLOAD_SECONDS} s")
    finally:
        given_up.set()
    if isinstance(found, Exception):
        raise OSError(f"could not fetch {address}: {found}") from found
    return found


def _fetched(address: str, given_up: threading.Event) -> BytesIO:
    # Only needed here: importing the package must not need the web.
    import requests

    content = BytesIO()
    with requests.get(address, timeout=SILENCE_SECONDS, stream=True) as response:
        response.raise_for_status()
        stated = response.headers.get("Content-Length", "")
        _check_size(int(stated) if stated.isdecimal() else 0)
        # Small pieces, because a piece of a slow server arrives only when it is full.
        for piece in response.iter_content(4096):
            _check_size(content.tell() + len(piece))
            if given_up.is_set():
                break
            content.write(piece)
    content.seek(0)
    return content


def _check_size(size: int) -> None:
    if size > MAX_DOWNLOAD:
        raise ValueError(f"it is larger than {MAX_DOWNLOAD:,} bytes, the most that is read")


def load_image_from_base64(image: str | bytes, upright: bool = True) -> Image.Image:
    """Read an image from base64 text; its mode is kept. Errors as of `load_rgb`."""
    return _read(BytesIO(base64.b64decode(image)), "the image", upright)


def expand2square(pil_img: Image.Image, background_color: int | tuple[int, ...]) -> Image.Image:
    """Centre an image on a square canvas of its own mode; a square image is returned as it is.

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


def pad_to_square(image: Image.Image, colour: tuple[int, ...], side: int) -> Image.Image:
    """`expand2square` for an image that is resized to ``side`` next; if the square would be too large, do both at once.

    The result is then ``expand2square(image, colour).resize((side, side))`` up to rounding (one level of 255), without
    the memory for the square.

    Parameters
    ----------
    image : PIL.Image.Image
        Mode "RGB".
    colour : tuple of int
        Colour of the padding.
    side : int
        In pixels.
    """
    shorter, longer = sorted(image.size)
    if longer * (longer - shorter) <= MAX_PADDING or longer <= 4 * side:
        return expand2square(image, colour)
    # As Pillow does: the width first, then the height, each rounded to 8 bits.
    if image.width > image.height:
        narrow = image.resize((side, shorter), reducing_gap=REDUCING_GAP).transpose(Image.Transpose.TRANSPOSE)
        return _padded_and_resized(narrow, colour, side, longer).transpose(Image.Transpose.TRANSPOSE)
    averaged = image.reduce((1, math.ceil(longer / (REDUCING_GAP * 2 * side))))
    return _padded_and_resized(averaged, colour, side, longer).resize((side, side))


def _padded_and_resized(image: Image.Image, colour: tuple[int, ...], side: int, padded: int) -> Image.Image:
    """Centre an image in ``padded`` columns and resize to ``side`` columns, with only the padding near it in memory."""
    scale, left = padded / side, (padded - image.width) // 2
    # Bicubic reaches two columns of the result to each side.
    first, last = math.floor(left / scale) - 3, math.ceil((left + image.width) / scale) + 3
    start, end = math.floor(max(0, first - 3) * scale), math.ceil(min(side, last + 3) * scale)
    first, last = max(0, first), min(side, last)
    result = Image.new("RGB", (side, image.height), colour)
    for top in range(0, image.height, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, image.height - top)
        near = Image.new("RGB", (min(end, padded) - start, rows), colour)
        near.paste(image.crop((0, top, image.width, top + rows)), (left - start, 0))
        box = (first * scale - start, 0, last * scale - start, rows)
        result.paste(near.resize((last - first, rows), box=box), (first, top))
    return result
