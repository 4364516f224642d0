"""Questions about random images, and a tokenizer, for what is gathered from a model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from PIL import Image

from llava.fitting.data import Source


class Words:
    """A tokenizer: a token a word."""

    bos_token_id = 1

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1, *(3 + sum(map(ord, word)) % 190 for word in text.split())])


def noise(seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (60, 50, 3), dtype=np.uint8))


def questions(count: int, opener=None) -> Source:
    """Each a few words longer than the one before."""

    def usual(number: int):
        return noise(number), " ".join(["what", "is", "this"] * (number + 1))

    return Source("images", [f"sample {number}" for number in range(count)], opener or usual, "1")
