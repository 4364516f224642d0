"""Every family in an engine: counts, tokens and log-probabilities are those of transformers on the same kept tokens."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from served import RATIO, Reference, Served
from tiny_served import FAMILIES, checkpoint

METHODS = ["otprune", "divprune", "downsample", "uniform"]


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


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """An engine that is small enough for prompts to be cut into chunks, and transformers' model."""
    folder = checkpoint(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    served = Served(folder, max_num_batched_tokens=160)
    yield served, Reference(folder)
    served.close()


@pytest.mark.parametrize(
    ("method", "ratio"), [("otprune", 1.0), *((method, ratio) for method in METHODS for ratio in (None, 0.5))]
)
def test_answers_are_those_of_transformers(both, method, ratio):
    served, reference = both
    served.use(method)
    expected = reference.ask(CONVERSATIONS, method, RATIO if ratio is None else ratio)
    found = served.ask(CONVERSATIONS, ratio)
    assert [one.prompt for one in found] == [one.prompt for one in expected]
    assert all(one.agrees(other) for one, other in zip(found, expected, strict=True)), (found, expected)
