"""Images that are never encoded twice: what the vision tower gave for each, found again by its content."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llava.pruning.signals import content_key

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_logger = logging.getLogger(__name__)


def content_digests(images: Sequence[torch.Tensor]) -> list[Hashable]:
    """A digest of each image's values, computed where they lie: on a GPU the host waits once for all of them.

    On a CPU it is `content_key`; on a GPU two sums of the values' bits with random weights, modulo 2^64. Images that
    differ agree in both once in 2^60 times or less, and nobody chooses images that do: for telling images apart, not
    for signing them. Shape, dtype and device are not part of a digest, and one of a GPU is none of a CPU.
    """
    if any(image.device.type == "cpu" for image in images):
        return [content_key(image) for image in images]
    return [tuple(sums) for sums in torch.stack([_weighted_sums(image) for image in images]).tolist()] if images else []


def image_keys(images: torch.Tensor) -> list[Hashable]:
    """What each image (B, 3, H, W) is remembered by: its digest, shape and dtype."""
    shape_and_type = (*images.shape[1:], str(images.dtype))
    return [(digest, *shape_and_type) for digest in content_digests(list(images))]


@dataclass(frozen=True)
class _Identified:
    """What is known of a tensor of images, and travels as an attribute of it."""

    keys: list[Any]
    outputs: Mapping[Hashable, Mapping[Hashable, torch.Tensor]] = field(default_factory=dict)


_IDENTIFIED = "identified_images"


def identify(images: torch.Tensor) -> list[Any]:
    """Attach the keys of images on a CPU to their tensor, which must not be written to any more, and return them."""
    identified = _Identified(image_keys(images))
    vars(images)[_IDENTIFIED] = identified
    return identified.keys


def content_keys(images: Sequence[torch.Tensor] | torch.Tensor) -> list[int]:
    """`content_key` of each image; those of identified images are not computed again."""
    identified = vars(images).get(_IDENTIFIED) if isinstance(images, torch.Tensor) else None
    return [content_key(image) for image in images] if identified is None else [key[0] for key in identified.keys]


def _weighted_sums(image: torch.Tensor) -> torch.Tensor:
    """(2,), int64."""
    bits = image.detach().contiguous().view(_INTEGERS[image.element_size()]).flatten()
    return (_weights(len(bits), image.device) * bits).sum(dim=1)  # what overflows is dropped


@lru_cache(maxsize=16)  # one a shape: crops differ in number
def _weights(n: int, device: torch.device) -> torch.Tensor:
    drawn = torch.empty(2, n, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(n))
    return (2 * drawn + 1).to(device, non_blocking=True)


class VisualCache:
    """The vision tower's outputs by image, in memory, the least recently used out when they take too many bytes.

    Benchmarks ask many questions about one image (GQA about 31, POPE 18), and every pruning method sees the same
    features of it. They are remembered as the tower gives them, unless ``holds_projected``; an image (or crop) of
    LLaVA-1.5 takes 1.2 MB in half precision. A cache belongs to one tower: `clear` it when the weights change.

    Parameters
    ----------
    max_bytes : int
        What is larger is not remembered.

    Attributes
    ----------
    hits, misses : int
        Images (or crops) that were there, and that had to be encoded.
    seconds : float
        Spent on images that had to be encoded. On a GPU without files it is the host's share alone, which waits for
        nothing.
    nbytes : int
        What is remembered now.
    expected : tuple of Output
        What later calls are going to want as well: it is remembered when an image is encoded anyway.
    holds_projected : bool
        Remember the features as the projector gives them, not as the tower does; for a cache of one projector.

    Raises
    ------
    ValueError
        If ``max_bytes`` is negative.
    """

    def __init__(self, max_bytes: int):
        if max_bytes < 0:
            raise ValueError(f"a cache of visual tokens cannot hold {max_bytes} bytes")
        self.max_bytes = max_bytes
        self.hits = self.misses = self.nbytes = 0
        self.seconds = 0.0
        self.expected: tuple[Hashable, ...] = ()
        self.holds_projected = False
        self._entries: OrderedDict[Hashable, dict[Hashable, torch.Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def outputs(
        self,
        images: torch.Tensor,
        names: Sequence[Hashable],
        encode: Callable[[torch.Tensor], Mapping[Hashable, torch.Tensor]],
    ) -> dict[Hashable, torch.Tensor]:
        """The encoder's outputs for images (B, 3, H, W) by name; only images that lack one of them are encoded.

        A name stands for all that an output depends on besides image and tower. ``encode`` makes pixels (b, 3, H, W) at
        least those outputs, (b, N, ...) each; all that it gives is remembered. A `ValueError` for images of NaN.
        """
        identified = vars(images).get(_IDENTIFIED) or _Identified(image_keys(images))
        keys = identified.keys
        known = identified.outputs or {key: self.get(key, names) for key in dict.fromkeys(keys)}
        found = {key: entry for key, entry in known.items() if entry is not None}
        missing = [key for key in known if key not in found]
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        if missing:
            if images.device.type == "cpu" and bool(images[:, 0, 0, 0].isnan().any()):
                raise ValueError("images of NaN cannot be encoded: a part of a stand-in has no outputs of its own")
            started = time.perf_counter()
            chosen = [keys.index(key) for key in missing]
            # An index would be brought to the GPU first.
            fresh = encode(images if len(missing) == len(keys) else torch.stack([images[i] for i in chosen]))
            for row, key in enumerate(missing):
                found[key] = {name: values[row] for name, values in fresh.items()}
                self.put(key, found[key])
            self.seconds += time.perf_counter() - started
            if len(missing) == len(keys):
                return {name: fresh[name] for name in names}
        return {name: torch.stack([found[key][name] for key in keys]) for name in names}

    def get(self, key: Hashable, names: Sequence[Hashable]) -> Mapping[Hashable, torch.Tensor] | None:
        """An image's outputs, if all of ``names`` are remembered."""
        entry = self._entries.get(key)
        if entry is None or not entry.keys() >= set(names):
            return None
        self._entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, outputs: Mapping[Hashable, torch.Tensor]) -> None:
        """Remember an image's outputs beside those that are, and forget others where there is no room."""
        # A row of a batch would keep the whole batch alive.
        entry = self._forget(key) | {name: values.detach().clone() for name, values in outputs.items()}
        size = _nbytes(entry)
        if size > self.max_bytes:
            return
        self._entries[key] = entry
        self.nbytes += size
        while self.nbytes > self.max_bytes:
            self._forget(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget everything; the counts stay."""
        self._entries.clear()
        self.nbytes = 0

    def _forget(self, key: Hashable) -> dict[Hashable, torch.Tensor]:
        entry = self._entries.pop(key, {})
        self.nbytes -= _nbytes(entry)
        return entry


def _nbytes(entry: Mapping[Hashable, torch.Tensor]) -> int:
    return sum(values.nbytes for values in entry.values())


class VisualStore(VisualCache):
    """The same in files, which the processes and the configurations of a run share; read memory-mapped.

    Nothing is thrown out when the folder is full: run after run asks for the same images in the same order, and the
    least recently used one is then the next that is wanted.

    Parameters
    ----------
    folder : Path
        Of one tower: see `encoder_fingerprint`. Several processes of a machine may use it at once.
    max_bytes : int
        What the folder may hold, all processes together.
    device : torch.device or str
        Where outputs are wanted.
    """

    def __init__(self, folder: Path, max_bytes: int, device: torch.device | str = "cpu"):
        super().__init__(max_bytes)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._device, self._full = folder, torch.device(device), False

    def stand_in(self, keys: Sequence[Any], names: Sequence[Hashable]) -> torch.Tensor | None:
        """A tensor (B, 3, H, W) in place of identified images: with their outputs, but without their pixels (NaN).

        For a caller that has seen the images before, and need not read and prepare them again; a slice of it has
        neither. None if one of them lacks one of the outputs.
        """
        outputs = {key: entry for key in dict.fromkeys(keys) if (entry := self.get(key, names)) is not None}
        alike = {key[1:] for key in keys}
        if len(alike) != 1 or not all(key in outputs for key in keys):
            return None
        *shape, dtype = alike.pop()
        images = torch.full((), torch.nan, dtype=getattr(torch, dtype.removeprefix("torch."))).expand(len(keys), *shape)
        vars(images)[_IDENTIFIED] = _Identified(list(keys), outputs)
        return images

    def get(self, key: Hashable, names: Sequence[Hashable]) -> Mapping[Hashable, torch.Tensor] | None:
        try:
            return {name: self._read(self._path(key, name)) for name in names}
        except (OSError, SafetensorError):
            return None

    def put(self, key: Hashable, outputs: Mapping[Hashable, torch.Tensor]) -> None:
        """Write an image's outputs, each whole or not at all; does nothing once there is no room."""
        try:
            for name, values in outputs.items():
                path = self._path(key, name)
                if not self._full and not path.exists():
                    self._write(path, values)
        except (OSError, SafetensorError, NotImplementedError) as error:
            # The last on network file systems without locks.
            self._full = True
            _logger.warning("encoded images are not stored any more: %s", error)

    def _path(self, key: Hashable, name: Hashable) -> Path:
        file = hashlib.sha256(repr((key, name)).encode()).hexdigest()[:32]
        return self._folder / file[:2] / f"{file}.safetensors"

    def _read(self, path: Path) -> torch.Tensor:
        return load_file(path)["values"].to(self._device, non_blocking=True)

    def _write(self, path: Path, values: torch.Tensor) -> None:
        used = self._folder / "bytes"
        with FileLock(self._folder / "lock"):
            self.nbytes = int(used.read_text()) if used.exists() else 0
            if self.nbytes + values.nbytes > self.max_bytes:
                self._full = True
                return
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.part")
            save_file({"values": values.detach().cpu().contiguous()}, temporary)
            temporary.replace(path)
            self.nbytes += values.nbytes
            used.write_text(str(self.nbytes))


def encoder_fingerprint(tower: Any, projector: torch.nn.Module | None = None) -> str:
    """Sixteen hexadecimal digits of all that a vision tower's outputs depend on besides the pixels.

    Weights, sizes and the layer that is read, dtype, attention and device, this code, and the libraries' versions; with
    a ``projector`` also what the projected features depend on.
    """
    import transformers  # slow, and not needed to select tokens

    digest = hashlib.sha256()
    for module in (tower,) if projector is None else (tower, projector):
        for name, values in sorted(module.state_dict().items()):
            digest.update(f"{name}\0{values.dtype}\0{tuple(values.shape)}\0".encode())
            digest.update(values.detach().cpu().contiguous().view(torch.uint8).numpy())
    about = (
        tower.config.to_json_string(),
        tower.config._attn_implementation,
        repr(projector),
        tower.select_layer,
        tower.select_feature,
        tower.device.type,
        torch.cuda.get_device_name(tower.device) if tower.device.type == "cuda" else "",
        torch.__version__,
        transformers.__version__,
    )
    digest.update(repr(about).encode())
    for path in sorted((Path(__file__).parent / "multimodal_encoder").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
