"""Images from files and from the web as RGB, and padded to a square.

What comes from outside may be anything: every limit is one sentence, before memory or time is spent.
"""

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
"""For all of it, redirects included."""
SILENCE_SECONDS = (10, 30)
"""Until a connection stands, and without a byte."""
MAX_PADDING = 2**25
"""Pixels (128 MiB) that padding to a square may take; above, the image is resized first."""
REDUCING_GAP = 64.0
"""For Pillow's resize: a side that is 128 times too long and more is averaged by whole numbers first."""


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
        An RGB image that is already decoded is returned as it is. A file is refused when it is cut off; an image
        that somebody else opened follows the process's Pillow setting for that (lmms-eval accepts cut-off images,
        because published data sets hold some).
    name : str, optional
        What error messages call the image; the path or the image's format and size by default.
    upright : bool
        Turn the image of a file as its EXIF orientation states; the original LLaVA takes it as it is stored. A
        `PIL.Image.Image` is taken as it is: its size may be known elsewhere already.

    Returns
    -------
    PIL.Image.Image
        Mode "RGB", decoded.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If there is no such file.
    ValueError
        If the content is no image, is cut off or damaged, has more pixels than Pillow allows, or holds numbers that
        have no defined brightness (floating point, or integers outside 0..65535).
    TypeError
        If ``source`` is none of the above.
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
    except Exception:  # of any kind, where the metadata is damaged; it says nothing about the image then
        return image


def _decode(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name} is truncated or damaged: {error}") from error


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Have Pillow refuse cut-off files inside the block, whatever another package has set for the whole process."""
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
        Follow the EXIF orientation; False for the image as the original LLaVA reads it.

    Raises
    ------
    OSError
        If the file does not exist, or the address cannot be fetched, not within `DOWNLOAD_SECONDS`, or is larger than
        `MAX_DOWNLOAD`.
    ValueError
        If what was read is not a sound image.
    """
    if not image_file.startswith(("http://", "https://")):
        return load_rgb(image_file, upright=upright)
    return load_rgb(_download(image_file), image_file, upright)


def _download(address: str) -> BytesIO:
    """What stands at an address.

    A timeout of requests is for each silence: a server that sends a byte now and then is never timed out. Hence the
    thread, which gives up by itself when nobody waits for it.
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
        # Small pieces: a slow server's come in when they are full.
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
    """Read an image that was sent as base64 text; its mode is left as it is. Errors as of `load_rgb`."""
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


def pad_to_square(image: Image.Image, colour: tuple[int, int, int], side: int) -> Image.Image:
    """`expand2square`, for an image that is resized to ``side`` next: where padding is too large, it is so already.

    Then no canvas of the longer side squared is made, and what comes is
    ``expand2square(image, colour).resize((side, side))`` up to rounding, one level of 255.

    Parameters
    ----------
    image : PIL.Image.Image
        Mode "RGB".
    colour : tuple of int
        Of the padding.
    side : int
        In pixels.
    """
    shorter, longer = sorted(image.size)
    if longer * (longer - shorter) <= MAX_PADDING or longer <= 4 * side:
        return expand2square(image, colour)
    wide = image.width > image.height
    # As Pillow does: the width first, then the height, each rounded to 8 bits.
    if wide:
        image = image.resize((side, shorter), reducing_gap=REDUCING_GAP)
        padded = _padded_and_resized(np.asarray(image).swapaxes(0, 1), colour, side, longer).swapaxes(0, 1)
        return Image.fromarray(np.ascontiguousarray(padded))
    averaged = math.ceil(longer / (REDUCING_GAP * 2 * side))
    pixels = np.asarray(image.reduce((1, averaged)) if averaged > 1 else image)
    padded = Image.fromarray(_padded_and_resized(pixels, colour, side, longer))
    return padded.resize((side, side))


def _padded_and_resized(pixels: np.ndarray, colour: tuple[int, int, int], side: int, padded: int) -> np.ndarray:
    """Rows (n, w, 3), centred in rows of ``padded`` pixels of a colour and resized to (n, side, 3), uint8 all.

    Bicubic as Pillow has it. What a weight does not give to the image it gives to the colour.
    """
    width = pixels.shape[1]
    scale = padded / side
    places = (np.arange(width) + (padded - width) // 2 + 0.5) / scale
    x = np.abs(places - (np.arange(side)[:, None] + 0.5))  # (side, w)
    weights = (
        np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0)) / scale
    )
    reached = weights.any(axis=1)
    weights = weights[reached].T.astype(np.float32)  # (w, columns that the image reaches)
    background = np.asarray(colour, dtype=np.float32)
    result = np.empty((len(pixels), side, 3), dtype=np.uint8)
    result[:] = colour
    for start in range(0, len(pixels), 256):
        block = pixels[start : start + 256] - background
        value = np.tensordot(block, weights, axes=(1, 0)).swapaxes(1, 2) + background  # (rows, columns, 3)
        result[start : start + 256, reached] = np.rint(value).clip(0, 255)
    return result
