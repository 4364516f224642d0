"""Features of a frozen vision tower in a folder: shards of safetensors, and what they are in ``features.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from llava.files import atomic_write, write_json
from llava.fitting.data import Source

DESCRIPTION, TENSOR = "features.json", "features"

PUBLISHED_DEPTH = (8, 23)
"""Of CLIP-L's layers that run, the published code reads the output of this one, counted from 0."""


@dataclass(frozen=True)
class Description:
    """What the features of a folder are.

    Attributes
    ----------
    model : str
        Checkpoint whose vision tower made them.
    layer : int
        The tower's layer whose output they are, counted from 0.
    tokens, width : int
        Of each image: (tokens, width), without [CLS].
    pictures : str
        Where the images come from.
    count, shard : int
        How many images there are when all shards are, and how many a shard has.
    """

    model: str
    layer: int
    tokens: int
    width: int
    pictures: str
    count: int
    shard: int

    @classmethod
    def read(cls, folder: Path) -> Description:
        """What a folder holds; an `OSError` if it holds no features, a `ValueError` if its description is damaged."""
        file = folder / DESCRIPTION
        if not file.is_file():
            raise OSError(f"{folder} is no folder of features: it has no {DESCRIPTION} (llava ocvtp extract writes it)")
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} does not describe features: {error}") from error

    def shards(self, folder: Path) -> list[tuple[Path, range]]:
        """Every shard's file, and the images in it."""
        starts = range(0, self.count, self.shard)
        return [
            (folder / f"features-{number:05d}.safetensors", range(start, min(start + self.shard, self.count)))
            for number, start in enumerate(starts)
        ]


def default_layer(depth: int) -> int:
    """The layer of a tower at the published one's relative depth."""
    layer, layers = PUBLISHED_DEPTH
    return round(layer * (depth - 1) / (layers - 1))


def extract(
    tower,
    model: str,
    images: Source,
    folder: Path,
    *,
    layer: int | None = None,
    shard: int = 64,
    batch: int = 16,
) -> Description:
    """Write the features of images, each squeezed to the tower's square as published; shards that are there stay.

    ``model`` is the checkpoint's name, for the description; ``layer`` the tower's, from 0, or from the end of the
    layers that run (`default_layer` if left out); ``shard`` and ``batch`` are images per file, and images at a time. An
    OSError or ValueError if an image cannot be read, the layer is not one that runs, or the folder holds others.
    """
    depth = tower.depth
    layer = default_layer(depth) if layer is None else layer
    if not -depth <= layer < depth:
        raise ValueError(f"--layer {layer}: {depth} layers of this vision tower run, so 0 to {depth - 1} are allowed")
    sizes = {"tokens": tower.num_patches, "width": tower.hidden_size, "count": len(images), "shard": shard}
    described = Description(model=model, layer=layer % depth, pictures=images.name, **sizes)
    if not (folder / DESCRIPTION).exists():
        write_json(folder / DESCRIPTION, asdict(described))
    there = asdict(Description.read(folder))
    for name, value in asdict(described).items():
        if there[name] != value:
            raise ValueError(f"{folder} holds features with {name} {there[name]}, not {value}: give another --output")
    with tqdm(total=len(images), desc="features", unit="image", disable=None) as bar:
        for file, members in described.shards(folder):
            names = json.dumps([images.names[number] for number in members])
            if not file.exists():
                parts = [
                    tower.layer_output(_pixels(tower, images, members[i : i + batch]), described.layer).cpu()
                    for i in range(0, len(members), batch)
                ]
                tensors = {TENSOR: torch.cat(parts).to(torch.float16).contiguous()}
                atomic_write(file, partial(save_file, tensors, metadata={"names": names}))
            elif _opened(file).metadata().get("names") != names:
                raise ValueError(f"{file} holds features of other images: give another --output")
            bar.update(len(members))
    return described


class Features(torch.utils.data.Dataset):
    """A complete folder of features, read one image at a time.

    An OSError if the folder holds no features or a shard is unreadable, a ValueError if shards are missing.
    """

    def __init__(self, folder: Path):
        self.description = Description.read(folder)
        self._shards = self.description.shards(folder)
        there = sum(file.is_file() for file, _ in self._shards)
        if there < len(self._shards):
            raise ValueError(
                f"{folder} holds {there} of {len(self._shards)} shards: run extract again, it continues where it was"
            )
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.description.count

    def __getitem__(self, number: int) -> torch.Tensor:
        """The features of one image: (tokens, width), float16."""
        shard, place = divmod(number, self.description.shard)
        if shard not in self._open:
            self._open[shard] = _opened(self._shards[shard][0]).get_slice(TENSOR)
        return self._open[shard][place]


def _pixels(tower, images: Source, members: range) -> torch.Tensor:
    side = tower.config.image_size
    squares = [images.open(number)[0].resize((side, side), Image.Resampling.BICUBIC) for number in members]
    return tower.image_processor.preprocess(squares, return_tensors="pt")["pixel_values"]


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise OSError(f"Cannot read {file}: {error}") from error
