"""A folder of features: shards of safetensors, and what they are in ``features.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llava.files import atomic_write, write_json

DESCRIPTION = "features.json"
TENSOR = "features"


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
        Of each picture: (tokens, width), without [CLS].
    pictures : str
        Where the pictures come from.
    count : int
        How many there are when all shards are.
    shard : int
        Pictures a shard.
    """

    model: str
    layer: int
    tokens: int
    width: int
    pictures: str
    count: int
    shard: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard)

    def numbers(self, shard: int) -> range:
        """The pictures in a shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.count))


def shard_file(folder: Path, shard: int) -> Path:
    """Where a shard lies."""
    return folder / f"features-{shard:05d}.safetensors"


def describe(folder: Path, description: Description) -> None:
    """Write ``features.json``, or check that the folder is being filled with the same features.

    Raises
    ------
    ValueError
        If the folder holds others.
    """
    file = folder / DESCRIPTION
    if not file.exists():
        write_json(file, asdict(description))
        return
    there = read_description(folder)
    for name, value in asdict(description).items():
        if getattr(there, name) != value:
            raise ValueError(
                f"{folder} holds features with {name} {getattr(there, name)}, not {value}: give another --output"
            )


def read_description(folder: Path) -> Description:
    """What a folder holds.

    Raises
    ------
    OSError
        If it is no folder of features.
    ValueError
        If its description is damaged.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        raise OSError(
            f"{folder} is no folder of features: it has no {DESCRIPTION} (python -m llava.fitting.ocvtp extract)"
        )
    try:
        return Description(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} does not describe features: {error}") from error


def write_shard(folder: Path, shard: int, features: torch.Tensor, names: list[str]) -> None:
    """Write a shard (pictures, tokens, width) in float16, whole or not at all."""
    tensors, metadata = {TENSOR: features.to(torch.float16).contiguous()}, {"names": json.dumps(names)}
    atomic_write(shard_file(folder, shard), lambda part: save_file(tensors, part, metadata=metadata))


def has_shard(folder: Path, shard: int, names: list[str]) -> bool:
    """Whether a shard is there.

    Raises
    ------
    ValueError
        If it holds other pictures.
    """
    file = shard_file(folder, shard)
    if not file.exists():
        return False
    with _opened(file) as there:
        if json.loads((there.metadata() or {}).get("names", "[]")) != names:
            raise ValueError(f"{file} holds features of other pictures: give another --output")
    return True


class Features(torch.utils.data.Dataset):
    """A complete folder of features, read a picture at a time.

    Raises
    ------
    OSError
        If the folder is none of features, or a shard is unreadable.
    ValueError
        If shards are missing.
    """

    def __init__(self, folder: Path):
        self.folder, self.description = folder, read_description(folder)
        there = sum(shard_file(folder, shard).is_file() for shard in range(self.description.shards))
        if there == 0:
            raise ValueError(f"{folder} holds no features yet: run extract to its end")
        if there < self.description.shards:
            raise ValueError(
                f"{folder} holds {there} of {self.description.shards} shards: run extract again, it goes on"
            )
        self._open = {}

    def __len__(self) -> int:
        return self.description.count

    def __getitem__(self, number: int) -> torch.Tensor:
        """The features of one picture: (tokens, width), float16."""
        shard, place = divmod(number, self.description.shard)
        if shard not in self._open:
            self._open[shard] = _opened(shard_file(self.folder, shard)).get_slice(TENSOR)
        return self._open[shard][place]


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise OSError(f"Cannot read {file}: {error}") from error
