"""Images of several shapes, and conversations about one, two and none of them."""

from __future__ import annotations

import numpy as np
from PIL import Image


def noise(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


IMAGES = [noise(0, 112, 112), noise(1, 168, 64), noise(2, 64, 140), noise(3, 120, 88)]
CONVERSATIONS = [
    ([IMAGES[0]], "What is it?"),
    ([IMAGES[1]], "How many shapes are there, and of which colours?"),
    ([IMAGES[2], IMAGES[3]], "Which of them is larger, and why do you think so?"),
    ([], "Why?"),
]
