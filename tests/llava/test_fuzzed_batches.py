"""Every row of a batch gets what it gets alone, whatever stands beside it: drawn by seed, in float64.

``pytest tests/llava/test_fuzzed_batches.py --fuzz 50`` draws 50 times as many cases.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from itertools import chain

import pytest
import torch

from llava.mm_utils import get_anyres_image_grid_shape
from llava.pruning import available_methods, pruning
from llava.pruning.registry import method_class
from tiny_llava import SIDE, build, pad_rows, pixels, prompt
from tiny_methods import OPTIONS, RATIOS
from tiny_ocvtp import save_pruner

CASES = 6
"""Of each method, with ``--fuzz 1``."""

DEPTH = 4
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS}
LAYOUTS = {
    "square": {},
    "crops": ANYRES | {"mm_patch_merge_type": "spatial"},
    "newlines": ANYRES | {"mm_patch_merge_type": "spatial_unpad"},
}
SIZES = [(56, 112), (112, 40), (90, 84), (112, 112), (20, 110)]


@dataclass(frozen=True)
class Case:
    """What a batch is asked, and how.

    Attributes
    ----------
    images : tuple of tuple of (width, height)
        The images of every row.
    pieces : tuple of tuple of int
        Lengths of the text around them.
    """

    layout: str
    images: tuple[tuple[tuple[int, int], ...], ...]
    pieces: tuple[tuple[int, ...], ...]
    padding: str
    switch: dict


def draw(method: str, seed: int) -> Case:
    dice = random.Random(zlib.crc32(f"{method} {seed}".encode()))
    counts = [dice.choice((0, 1, 1, 2)) for _ in range(dice.randint(2, 4))]
    images = tuple(tuple(dice.choice(SIZES) for _ in range(count)) for count in counts)
    # Behind the last image there is text, which some methods ask.
    pieces = tuple((*(dice.randint(0, 9) for _ in range(count)), dice.randint(1, 9)) for count in counts)
    options = {"position_ids": dice.choice(("auto", "original", "compact")), "per_crop": dice.random() < 0.4}
    if method in RATIOS:
        options |= {"ratio": dice.choice((0.4, 0.6, 0.8))}
    else:
        layers = [layer for layer in range(DEPTH) if layer >= method_class(method).first_layer]
        options |= {"ratio": dice.choice((0.1, 0.3, 0.7)), "layer": dice.choice(layers)}
    return Case(
        layout=dice.choice(sorted(LAYOUTS)),
        images=images,
        pieces=pieces,
        padding=dice.choice(("left", "right")),
        switch=options,
    )


@pytest.fixture(scope="module")
def models(tower) -> dict[str, torch.nn.Module]:
    return {name: build(tower, **settings).double() for name, settings in LAYOUTS.items()}


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, dict]:
    return OPTIONS | {"ocvtp": {"checkpoint": save_pruner(tmp_path_factory.mktemp("pruner"))}}


def pixels_of(size: tuple[int, int], seed: int, layout: str) -> torch.Tensor:
    """(3, H, W), or (crops, 3, H, W)."""
    if layout == "square":
        return pixels(seed=seed).double()
    columns, rows = get_anyres_image_grid_shape(size, PINPOINTS, SIDE)
    return pixels(1 + columns * rows, seed=seed).double()


def answer(model, ids, mask, images, sizes) -> list[torch.Tensor]:
    """Logits (B, V) of three greedy steps."""
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    stacked = torch.stack(images) if images[0].ndim == 3 else images
    found = model.generate(ids, images=stacked, image_sizes=sizes, attention_mask=mask, **settings)
    return torch.stack(found.logits, dim=1)


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(CASES * metafunc.config.getoption("fuzz")))


@pytest.mark.parametrize("method", sorted(available_methods()))
def test_a_batch_is_its_rows_alone(models, options, method, seed):
    case = draw(method, seed)
    model = models[case.layout]
    rows = [prompt(*pieces, seed=row) for row, pieces in enumerate(case.pieces)]
    # A row without a mark passes over an image.
    sizes = [images or (SIZES[0],) for images in case.images]
    images = [
        [pixels_of(size, 10 * row + number, case.layout) for number, size in enumerate(own)]
        for row, own in enumerate(sizes)
    ]
    ids, mask = pad_rows(rows, case.padding)
    with pruning(model, method, **options.get(method, {}), **case.switch):
        batch = answer(model, ids, mask, [*chain(*images)], [*chain(*sizes)])
        alone = [answer(model, row[None], None, images[i], sizes[i])[0] for i, row in enumerate(rows)]
    # Norms and rotary angles are float32 in a float64 model, too.
    differing = [i for i, (found, own) in enumerate(zip(batch, alone, strict=True)) if (found - own).abs().max() > 1e-3]
    assert not differing, case
