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
from llava.model.language_model.kv_cache import CACHE
from llava.pruning import available_methods, pruning
from llava.pruning.registry import method_class
from tiny_llava import SIDE, build, pad_rows, pixels, prompt
from tiny_methods import OPTIONS, RATIOS
from tiny_trained import trained_networks

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
SIDES = ("left", "right")
WAYS = ("generate", "static cache", "steps with a mask", "steps without a mask")
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
    padding : str
        Of the ids, and of the embedded prompts.
    """

    layout: str
    images: tuple[tuple[tuple[int, int], ...], ...]
    pieces: tuple[tuple[int, ...], ...]
    padding: tuple[str, str]
    way: str
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
        layers = [layer for layer in range(DEPTH) if layer >= method_class(method)().first_layer]
        options |= {"ratio": dice.choice((0.1, 0.3, 0.7)), "layer": dice.choice(layers)}
    return Case(
        layout=dice.choice(sorted(LAYOUTS)),
        images=images,
        pieces=pieces,
        padding=(dice.choice(SIDES), dice.choice(SIDES)),
        way=dice.choice(WAYS),
        switch=options,
    )


@pytest.fixture(scope="module")
def models(tower) -> dict[str, torch.nn.Module]:
    return {name: build(tower, **settings).double() for name, settings in LAYOUTS.items()}


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, dict]:
    return OPTIONS | trained_networks(tmp_path_factory.mktemp("trained"))


def pixels_of(size: tuple[int, int], seed: int, layout: str) -> torch.Tensor:
    """(3, H, W), or (crops, 3, H, W)."""
    if layout == "square":
        return pixels(seed=seed).double()
    columns, rows = get_anyres_image_grid_shape(size, PINPOINTS, SIDE)
    return pixels(1 + columns * rows, seed=seed).double()


def answer(model, way, ids, mask, images, sizes) -> torch.Tensor:
    """Logits (B, 3, V) of three greedy steps."""
    asked = {"images": torch.stack(images) if images[0].ndim == 3 else images, "image_sizes": sizes}
    if way.startswith("steps"):
        return steps(model, asked | {"input_ids": ids, "attention_mask": mask if way == "steps with a mask" else None})
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    if way == "static cache":
        settings["cache_implementation"] = "static"
    return torch.stack(model.generate(ids, attention_mask=mask, **asked, **settings).logits, dim=1)


@torch.no_grad()
def steps(model, asked) -> torch.Tensor:
    """The same through `forward`, token by token."""
    first, mask, logits = model(**asked, use_cache=True), asked["attention_mask"], []
    last = torch.full((len(first.logits),), first.logits.shape[1] - 1)
    prefill = model.latest_prefill
    if prefill.mask is not None and prefill.left is None:  # drops inside the decoder leave rows padded on the left
        last -= prefill.mask.flip(1).int().argmax(dim=1)
    logits.append(first.logits[range(len(last)), last])
    while len(logits) < 3:
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=True)
        token = logits[-1].argmax(dim=-1, keepdim=True)
        logits.append(model(input_ids=token, attention_mask=mask, **{CACHE: first[CACHE]}).logits[:, -1])
    return torch.stack(logits, dim=1)


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(CASES * metafunc.config.getoption("fuzz")))


@pytest.mark.parametrize("method", sorted(available_methods()))
def test_a_batch_is_its_rows_alone(models, options, method, seed, monkeypatch):
    case = draw(method, seed)
    model = models[case.layout]
    monkeypatch.setattr(model.config, "tokenizer_padding_side", case.padding[1], raising=False)
    rows = [prompt(*pieces, seed=row) for row, pieces in enumerate(case.pieces)]
    # A row without a mark passes over an image.
    sizes = [images or (SIZES[0],) for images in case.images]
    images = [
        [pixels_of(size, 10 * row + number, case.layout) for number, size in enumerate(own)]
        for row, own in enumerate(sizes)
    ]
    if case.way == "steps without a mask":  # of ids, that is: images of other lengths are padded all the same
        longest = max(map(len, rows))
        rows = [torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows]
    ids, mask = pad_rows(rows, case.padding[0])
    with pruning(model, method, **options.get(method, {}), **case.switch):
        batch = answer(model, case.way, ids, mask, [*chain(*images)], [*chain(*sizes)])
        alone = [answer(model, "generate", row[None], None, images[i], sizes[i])[0] for i, row in enumerate(rows)]
    # Norms and rotary angles are float32 in a float64 model, too.
    differing = [i for i, (found, own) in enumerate(zip(batch, alone, strict=True)) if (found - own).abs().max() > 1e-3]
    assert not differing, case


def test_padding_on_the_left_turns_no_keys_that_a_method_ranks_by(models, options, monkeypatch):
    """DART's L1 norms of keys hold a trace of their positions, which padding must not move, in `forward` either."""
    test_a_batch_is_its_rows_alone(models, options, "dart", 22, monkeypatch)
