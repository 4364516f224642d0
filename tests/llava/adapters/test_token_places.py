"""What is painted into an image changes the tokens that are drawn there and no others, in LLaVA and in every family.

Attention in the vision encoder is switched off, so that a token depends on its own pixels alone.
"""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from llava.eval.encoder import EVERYTHING, Encoder, TransformersEncoder
from llava.eval.views import NOTHING
from llava.pruning import PruningConfig, pruning
from tiny_llava import build, save_tower
from tiny_methods import TWICE
from tiny_processors import PROCESSORS, tiny_processor
from tiny_vlms import tiny

OWN = {
    "padded": {"image_aspect_ratio": "pad"},
    "cropped": {},
    "anyres": {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
    },
    "anyres with padding": {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial",
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
    },
}
"""Ways in which this package's own LLaVA prepares images."""


@pytest.fixture(scope="module")
def looking(request, tmp_path_factory):
    if request.param not in OWN:
        return encoder(request.param)
    tower = save_tower(tmp_path_factory.mktemp("tower"))
    return Encoder(build(tower, **OWN[request.param]), CLIPImageProcessor.from_pretrained(tower))


def encoder(name: str) -> TransformersEncoder:
    return TransformersEncoder(tiny(name).model, tiny_processor(name))


@contextmanager
def without_attention(model):
    """Every attention module of the vision encoder adds nothing."""

    def nothing(module, args, output):
        if isinstance(output, tuple):
            return tuple(part * 0 if isinstance(part, torch.Tensor) else part for part in output)
        return output * 0

    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else model.get_encoder("image")
    with ExitStack() as stack:
        for module in tower.modules():
            if type(module).__name__.endswith("Attention"):
                stack.callback(module.register_forward_hook(nothing).remove)
        yield


def features(looking: Encoder, images) -> list[np.ndarray]:
    """All tokens (N, D) of each image."""
    encoded, _, _ = looking._encoded(images, EVERYTHING, "")
    return [torch.cat([unit.features for unit in own]).float().numpy() for own in encoded]


def noise(draw: random.Random) -> Image.Image:
    size = draw.randint(24, 150), draw.randint(24, 150)
    coarse = np.random.default_rng(draw.randrange(2**32)).integers(60, 200, (size[1] // 6, size[0] // 6, 3))
    return Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def painted(image: Image.Image, draw: random.Random) -> Image.Image:
    """A patch of about a hundredth of the image, white."""
    width, height = (max(3, side // 10) for side in image.size)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    image = image.copy()
    image.paste((255, 255, 255), (left, top, left + width, top + height))
    return image


def cells(view) -> np.ndarray:
    """The mean colour of each patch as it is drawn."""
    rows, columns = view.patches.shape
    pixels = np.asarray(view.image, dtype=float)
    return pixels.reshape(rows, pixels.shape[0] // rows, columns, -1, 3).mean(axis=(1, 3))


WRONG = {
    "column by column": lambda patches: patches.T.reshape(patches.shape),
    "upside down": lambda patches: patches[::-1],
    "from right to left": lambda patches: patches[:, ::-1],
    "rows one token too long": lambda patches: np.stack([np.roll(patches, -r)[r] for r in range(len(patches))]),
}
"""Orders in which no model reads its tokens."""
ALIKE = 0.6
"""Mean correlation of paint and change over a test's views. A view alone can have 0.4: a patch that covers parts of
four cells of a 4 x 4 map changes their tokens by no fixed measure of how much of each it covers."""


def likeness(paint: np.ndarray, change: np.ndarray) -> float:
    return float(np.corrcoef(paint.ravel(), change.ravel())[0, 1]) if paint.std() and change.std() else 0.0


@pytest.mark.parametrize("looking", [*OWN, *sorted(PROCESSORS)], indirect=True)
def test_paint_changes_the_tokens_that_are_drawn_there(looking, request):
    draw, right, wrong = random.Random(request.node.name), [], {order: [] for order in WRONG}
    with without_attention(looking.model):
        while len(right) < 4 * request.config.getoption("fuzz") or not all(wrong.values()):
            images = [noise(draw) for _ in range(draw.choice((1, 1, 2)))]
            chosen = draw.randrange(len(images))
            after = list(images)
            after[chosen] = painted(images[chosen], draw)
            tokens = [
                np.linalg.norm(b - a, axis=1)
                for a, b in zip(*(features(looking, x) for x in (images, after)), strict=True)
            ]
            drawn = zip(looking.views(images), looking.views(after), strict=True)
            for number, (change, (before, now)) in enumerate(zip(tokens, drawn, strict=True)):
                if number != chosen:
                    assert not change.any()
                    continue
                placed = np.concatenate([view.patches.ravel() for view in before])
                placed = placed[placed != NOTHING]
                assert len(set(placed)) == len(placed) and set(np.flatnonzero(change)) <= set(placed)
                for one, other in zip(before, now, strict=True):
                    paint = np.abs(cells(other) - cells(one)).mean(axis=2)
                    if paint.max() < 2:  # outside what the model is shown, or next to nothing of it
                        continue
                    changed = np.where(one.patches == NOTHING, 0, change[one.patches])
                    right.append(likeness(paint, changed))
                    assert right[-1] > 0.3, (one.name, images[chosen].size)
                    for order, read in WRONG.items():
                        if likeness(paint, read(paint)) < 0.1:  # else the paint stays where it is
                            wrong[order].append(likeness(paint, read(changed)))
    assert np.mean(right) > ALIKE
    for order, likenesses in wrong.items():
        assert np.mean(likenesses) < ALIKE, order


@pytest.mark.parametrize("name", ["internvl", "llava_next", "qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize("method", ["otprune", "visionzip", "fastv", "vscan"])
def test_what_is_kept_is_what_the_session_counts(name, method):
    """Before the decoder and inside it, of two images in one prompt, tiles with a budget of their own put together."""
    looking = encoder(name)
    images = [noise(random.Random(1)), noise(random.Random(2))]
    whole = {"local_layer": 3} if name == "qwen2_5_vl" else {}  # its other layers look at windows
    config = PruningConfig(method, 0.3, options=TWICE | whole if method == "vscan" else {})
    kept = looking.kept(images, config)
    with pruning(looking.model, config) as session, torch.no_grad():
        looking.model(**looking._inputs(images))
        counts = session.visual_token_counts
        indices = [own.tolist() for own in session.kept]
    assert [len(own) for own in indices] == [left for _, left in counts]
    assert sum(total for total, _ in kept) == sum(total for total, _ in counts)
    assert sum(len(own) for _, own in kept) == sum(map(len, indices))
    assert all(sorted(set(own)) == sorted(own) and max(own) < total for total, own in kept)
    if len(indices) == 2:
        assert [sorted(own) for _, own in kept] == [sorted(own) for own in indices]
