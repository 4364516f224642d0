"""From pictures to a folder of features of a frozen vision tower; stopped at any time, it goes on where it was."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from llava.fitting.ocvtp.features import Description, describe, has_shard, write_shard
from llava.fitting.ocvtp.pictures import Pictures

PUBLISHED_DEPTH = (8, 23)
"""Of CLIP-L's layers that run, the published code reads the output of this one, counted from 0."""


def default_layer(depth: int) -> int:
    """The layer of a tower at the published one's relative depth."""
    layer, layers = PUBLISHED_DEPTH
    return round(layer * (depth - 1) / (layers - 1))


def extract(
    tower,
    model: str,
    pictures: Pictures,
    source: str,
    folder: Path,
    *,
    layer: int | None = None,
    shard: int = 64,
    batch: int = 16,
    quiet: bool = False,
) -> Description:
    """Write the features of pictures, each squeezed to the tower's square as the published recipe has it.

    Parameters
    ----------
    tower : CLIPVisionTower
    model, source : str
        Names of the checkpoint and of the pictures, for the record.
    pictures : Pictures
    folder : Path
        Shards that are there are left as they are.
    layer : int, optional
        Of the tower, from 0, or from the end of the layers that run; `default_layer` if left out.
    shard, batch : int
        Pictures a file, and pictures at a time.
    quiet : bool
        No progress bar.

    Raises
    ------
    ValueError
        If the layer is not one that runs, or the folder holds other features.
    OSError
        If a picture cannot be read.
    """
    depth = tower.depth
    layer = default_layer(depth) if layer is None else layer
    if not -depth <= layer < depth:
        raise ValueError(f"--layer {layer}: {depth} layers of this vision tower run, so 0 to {depth - 1} are allowed")
    description = Description(
        model=model,
        layer=layer % depth,
        tokens=tower.num_patches,
        width=tower.hidden_size,
        pictures=source,
        count=len(pictures),
        shard=shard,
    )
    describe(folder, description)
    with tqdm(total=len(pictures), desc="features", unit="picture", disable=quiet or None) as bar:
        for number in range(description.shards):
            members = description.numbers(number)
            names = [pictures.names[i] for i in members]
            if not has_shard(folder, number, names):
                parts = [
                    tower.layer_output(_pixels(tower, pictures, members[i : i + batch]), description.layer).cpu()
                    for i in range(0, len(members), batch)
                ]
                write_shard(folder, number, torch.cat(parts), names)
            bar.update(len(members))
    return description


def _pixels(tower, pictures: Pictures, members: range) -> torch.Tensor:
    side = tower.config.image_size
    squares = [pictures.open(number).resize((side, side), Image.Resampling.BICUBIC) for number in members]
    return tower.image_processor.preprocess(squares, return_tensors="pt")["pixel_values"]
