"""Stage one: a CLIP vision tower learns, patch by patch, what it looks at.

The tower's output patches are read by linear heads, one for each thing that can be known about a patch: what shape,
colour, size, word and letter it shows, where it is, where its object begins and ends and which of the nine places
holds it, and whether it is the one patch in the middle of its object (which makes things countable). The [CLS] token
is asked what the whole image holds, so that its attention means something. The heads are thrown away afterwards;
what they could read, the language model's projector can read as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.mini import scenes
from mini_training.grounding import facts_of
from mini_training.packing import Drawn

# CLIP's own, so that the published image processor's numbers serve unchanged.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

N_KINDS = (len(scenes.SHAPES) + 1) * len(scenes.COLORS)
MAX_OBJECTS = 8
# A patch belongs to the object that covers most of it, when that is at least this many of its 196 pixels.
MIN_PATCH_PIXELS = 24
CROWD = 6  # scenes that make a crowded one


@dataclass(frozen=True)
class Head:
    """A linear head on the patches: `classes` wide, trained where a patch's target is not -1."""

    classes: int
    weight: float = 1.0


PATCH_HEADS = {
    "shape": Head(len(scenes.SHAPES) + 2, 2.0),
    "color": Head(len(scenes.COLORS) + 1, 2.0),
    "size": Head(len(scenes.SIZES) + 1),
    "middle": Head(2, 2.0),
    "character": Head(len(scenes.CHARACTERS) + 1),
    "word": Head(len(scenes.TEXTS), 2.0),
    "background": Head(len(scenes.BACKGROUNDS), 0.3),
    "texture": Head(len(scenes.TEXTURES), 0.3),
    "row": Head(scenes.GRID, 0.3),
    "column": Head(scenes.GRID, 0.3),
    "place": Head(len(scenes.PLACES)),
}
# Box of the patch's object: centre, width and height, as fractions of the image; offset of the centre from the patch.
BOX_WIDTH = 6
BOX_WEIGHT = 20.0
IMAGE_WEIGHT = 2.0


def build_tower(config: dict) -> CLIPVisionModel:
    """A new tower of the configuration's sizes, with one layer more than is used (LLaVA reads layer -2)."""
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config["width"],
            num_attention_heads=config["heads"],
            num_hidden_layers=config["layers"] + 1,
            intermediate_size=config["intermediate"],
            image_size=scenes.IMAGE_SIZE,
            patch_size=scenes.PATCH_SIZE,
            projection_dim=config["width"],
            hidden_act="gelu",
        )
    )
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:] = grid_waves(scenes.GRID, config["width"])
    return tower


def grid_waves(side: int, width: int, amplitude: float = 0.4) -> torch.Tensor:
    """Positions to start from: sines and cosines of row and column, float32 (side * side, width).

    Free random positions take most of a training run to become coordinates; these are coordinates from the start.
    """
    steps = torch.arange(side, dtype=torch.float32)
    rates = math.pi / side * 2 ** torch.linspace(-1, math.log2(side), width // 4)
    angles = steps[:, None] * rates  # (side, width / 4)
    waves = torch.cat((angles.sin(), angles.cos()), -1)  # (side, width / 2)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return amplitude * torch.cat((rows, columns), -1).reshape(side * side, width)


def pixel_values(levels: torch.Tensor) -> torch.Tensor:
    """Images as CLIP's processor gives them: uint8 (B, 336, 336, 3) -> float32 (B, 3, 336, 336)."""
    mean, std = torch.tensor(IMAGE_MEAN, device=levels.device), torch.tensor(IMAGE_STD, device=levels.device)
    return ((levels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def hidden_state(tower: CLIPVisionModel, images: torch.Tensor) -> torch.Tensor:
    """The hidden state that LLaVA reads (layer -2): (B, 3, 336, 336) -> (B, 577, width)."""
    hidden = tower.pre_layrnorm(tower.embeddings(images))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    return hidden


def scene_targets(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """What the heads should say about a scene.

    For each of ``PATCH_HEADS`` int64 (576,), -1 where the head is not trained; ``box`` float32 (576, 6); ``kinds``
    float32 (72,), which pairs of shape and colour are there; ``texts`` float32 (34,); ``count`` int64 ().
    """
    labels = patch_labels(scene)
    instance = labels["instance"]
    rows, columns = np.indices(instance.shape)
    targets = {name: labels[name] for name in ("shape", "color", "size", "character", "background", "texture")}
    targets["word"] = labels["word"] - 1
    targets["row"], targets["column"] = rows, columns
    middle = np.zeros_like(instance)
    place = np.full_like(instance, -1)
    box = np.zeros((*instance.shape, BOX_WIDTH), np.float32)
    kinds, texts = np.zeros(N_KINDS, np.float32), np.zeros(len(scenes.TEXTS), np.float32)
    for number, thing in enumerate(scene.objects, start=1):
        own = instance == number
        x, y = thing.left + thing.width / 2, thing.top + thing.height / 2
        patch_x, patch_y = (columns + 0.5) * scenes.PATCH_SIZE, (rows + 0.5) * scenes.PATCH_SIZE
        distance = (patch_x - x) ** 2 + (patch_y - y) ** 2
        middle.flat[np.where(own, distance, np.inf).argmin()] = 1
        facts = facts_of(thing)
        place[own] = facts["place"]
        values = (x, y, thing.width, thing.height, x - patch_x, y - patch_y)
        box[own] = np.stack(np.broadcast_arrays(*values), -1)[own] / scenes.IMAGE_SIZE
        kinds[facts["shape"] * len(scenes.COLORS) + facts["color"]] = 1
        if "text" in facts:
            texts[facts["text"]] = 1
    targets["middle"], targets["place"] = middle, place
    flat = {name: np.ascontiguousarray(value.reshape(-1)) for name, value in targets.items()}
    flat["box"] = box.reshape(-1, BOX_WIDTH)
    flat["kinds"], flat["texts"], flat["count"] = kinds, texts, np.array(min(len(scene.objects), MAX_OBJECTS))
    return flat


def patch_labels(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """What each 14 x 14 patch shows, for dense supervision of a vision tower.

    A patch belongs to the object that covers most of it (at least 24 of its 196 pixels; an object that reaches this
    nowhere has the patch it covers best).

    Returns
    -------
    dict of str to numpy.ndarray
        int64 arrays of shape (24, 24), row by row from the top left:

        ``instance``   0, or 1 + index in ``scene.objects``
        ``shape``      0, or 1 + index in ``SHAPES``; ``1 + len(SHAPES)`` for a sign
        ``color``      0, or 1 + index in ``COLORS``
        ``size``       0, or 1 + index in ``SIZES``
        ``word``       0, or 1 + index in ``TEXTS`` (of the sign that the patch belongs to)
        ``character``  0, or 1 + index in ``CHARACTERS`` (of the letter with most ink in the patch)
        ``background`` index in ``BACKGROUNDS``, the same everywhere
        ``texture``    index in ``TEXTURES``, the same everywhere
    """
    owner = np.zeros((scenes.IMAGE_SIZE, scenes.IMAGE_SIZE), np.int64)
    letters = np.zeros((scenes.IMAGE_SIZE, scenes.IMAGE_SIZE), np.int64)
    for number, thing in enumerate(scene.objects, start=1):
        rows, columns = slice(thing.top, thing.top + thing.height), slice(thing.left, thing.left + thing.width)
        if thing.is_sign:
            owner[rows, columns] = number
            letters[rows, columns] = scenes.text_mask(thing.text, thing.scale, thing.width, thing.height)
        else:
            owner[rows, columns][scenes.shape_mask(thing.shape, thing.width)] = number

    cover = _patch_counts(owner, len(scene.objects) + 1)  # (24, 24, objects + 1)
    cover[..., 0] = 0
    instance = np.where(cover.max(-1) >= MIN_PATCH_PIXELS, cover.argmax(-1), 0)
    for number in range(1, len(scene.objects) + 1):
        if not (instance == number).any():
            instance.flat[cover[..., number].argmax()] = number

    ink = _patch_counts(letters, len(scenes.CHARACTERS) + 1)
    ink[..., 0] = 0
    names = ("shape", "color", "size", "text")
    described = [(0, 0, 0, 0)] + [[1 + facts_of(o).get(name, -1) for name in names] for o in scene.objects]
    shape, color, size, word = np.moveaxis(np.array(described)[instance], -1, 0)
    everywhere = np.ones((scenes.GRID, scenes.GRID), np.int64)
    return {
        "instance": instance,
        "shape": shape,
        "color": color,
        "size": size,
        "word": word,
        "character": ink.argmax(-1),
        "background": everywhere * tuple(scenes.BACKGROUNDS).index(scene.background),
        "texture": everywhere * scenes.TEXTURES.index(scene.texture),
    }


def _patch_counts(ids: np.ndarray, n: int) -> np.ndarray:
    """How many pixels of each patch have each id: (336, 336) of 0 .. n - 1 -> (24, 24, n)."""
    along = np.arange(scenes.IMAGE_SIZE) // scenes.PATCH_SIZE
    patch = along[:, None] * scenes.GRID + along[None, :]
    return np.bincount((patch * n + ids).ravel(), minlength=scenes.GRID * scenes.GRID * n).reshape(
        scenes.GRID, scenes.GRID, n
    )


def crowded_scene(split: str, seeds: Iterable[int]) -> scenes.Scene:
    """The first seed's scene with what finds room in it of the other seeds' scenes: signs, then the smallest shapes.

    Two or three times as many things to learn from as in a scene of the world, for the same work.
    """
    drawn = [scenes.sample_scene(seed, split) for seed in seeds]
    signs = [thing for scene in drawn for thing in scene.signs]
    rest = [thing for scene in drawn[1:] for thing in scene.shapes]
    kept: list[scenes.SceneObject] = []
    for thing in (*signs, *drawn[0].shapes, *sorted(rest, key=lambda o: o.width)):
        if not any(scenes.touch(thing, other) for other in kept):
            kept.append(thing)
    return replace(drawn[0], objects=tuple(kept))


@dataclass(frozen=True)
class TowerScenes(Drawn):
    """Images and targets; the share ``crowded`` of the images, the first ones, are crowded scenes."""

    crowded: float = 0.0

    def __getitem__(self, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        seed = self.first_seed + number
        if number < self.crowded * self.length:
            seeds = [seed, *(seed + copy * self.length for copy in range(1, CROWD))]
            scene = crowded_scene(self.split, seeds)
        else:
            scene = scenes.sample_scene(seed, self.split)
        return np.array(scenes.render(scene)), scene_targets(scene)


class TowerTask(nn.Module):
    """The tower with its heads: images and targets in, losses out."""

    def __init__(self, config: dict):
        super().__init__()
        self.tower = build_tower(config)
        width = config["width"]
        self.heads = nn.ModuleDict({name: nn.Linear(width, head.classes) for name, head in PATCH_HEADS.items()})
        self.box = nn.Linear(width, BOX_WIDTH)
        self.kinds = nn.Linear(width, N_KINDS)
        self.texts = nn.Linear(width, len(scenes.TEXTS))
        self.count = nn.Linear(width, MAX_OBJECTS + 1)

    def forward(self, levels: torch.Tensor, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses by name, and accuracies (no gradient) under ``accuracy/<name>``.

        Of uint8 images (B, 336, 336, 3), and their stacked `scene_targets`.
        """
        hidden = hidden_state(self.tower, pixel_values(levels))
        summary, patches = hidden[:, 0], hidden[:, 1:]
        seen = targets["shape"] > 0  # (B, 576)
        out: dict[str, torch.Tensor] = {}
        for name, head in PATCH_HEADS.items():
            scores, target = self.heads[name](patches).float(), targets[name]
            loss = F.cross_entropy(scores.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="none")
            loss = loss.view_as(target)
            # Objects cover a small part of an image; half of the loss is theirs.
            trained = target >= 0
            halves = [loss[part & trained].mean() for part in (seen, ~seen) if (part & trained).any()]
            out[name] = head.weight * sum(halves) / len(halves)
            asked = trained & seen if name != "character" else target > 0
            out[f"accuracy/{name}"] = (scores.argmax(-1) == target)[asked].float().mean().detach()
        box = self.box(patches).float()
        out["box"] = BOX_WEIGHT * F.smooth_l1_loss(box[seen], targets["box"][seen], beta=0.05)
        out["accuracy/box"] = ((box - targets["box"]).abs()[seen].amax(-1) < 0.03).float().mean().detach()
        for name, head in (("kinds", self.kinds), ("texts", self.texts)):
            loss = F.binary_cross_entropy_with_logits(head(summary).float(), targets[name])
            out[name] = IMAGE_WEIGHT * 5 * loss
        count = self.count(summary).float()
        out["count"] = 0.3 * IMAGE_WEIGHT * F.cross_entropy(count, targets["count"])
        out["accuracy/count"] = (count.argmax(-1) == targets["count"]).float().mean().detach()
        return out
