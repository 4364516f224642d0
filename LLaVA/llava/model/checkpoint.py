"""What a checkpoint is: the folder it lies in, its configuration, and which of the published layouts its files have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from huggingface_hub import is_offline_mode, snapshot_download
from transformers.utils import cached_file

import llava

EMBEDDED_MODEL = "llava-mini"
EMBEDDED_MODELS = {EMBEDDED_MODEL: "checkpoint", "llava-mini-reader": "reader"}
"""Model that is inside this package -> its folder in ``llava/mini``."""
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
"""Arguments of ``from_pretrained`` that choose files of a hub id, and how they are fetched."""
ADAPTERS, PROJECTOR, EXTRAS = "adapter_config.json", "mm_projector.bin", "non_lora_trainables.bin"
_SMALL_FILES = ["*.json", "*.txt", "*.model", PROJECTOR, EXTRAS, "adapter_model.*"]
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_LFS_MARK = b"version https://git-lfs.github.com/spec/"

Layout = Literal["full", "projector", "adapters"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are on this disk.

    Attributes
    ----------
    name : str
        As it was asked for: a folder or a hub id.
    folder : Path
    hub : mapping, or None
        `HUB_OPTIONS` of a hub id, "revision" the commit.
    """

    name: str
    folder: Path
    hub: Mapping[str, Any] | None = None

    def has(self, *names: str) -> bool:
        """Whether one of these files is there; names may be patterns."""
        return any(next(self.folder.glob(name), None) for name in names)

    def fetch_weights(self) -> None:
        """Bring a hub id's weights here, in one of the two formats, and the tower that it may hold in a folder."""
        if self.hub is None or self.has(*_WEIGHTS):
            return
        tower = read_config(str(self.folder)).get("mm_vision_tower")
        inside = [f"{tower}/*"] if isinstance(tower, str) and (self.folder / tower).is_dir() else []
        for pattern in _WEIGHTS:
            fetch(self.name, self.hub, [pattern, *inside])
            if self.has(pattern):
                return

    def layout(self, with_base: bool) -> Layout:
        """What the files hold: all weights, which are fetched, a projector, or LoRA adapters.

        Raises
        ------
        OSError
            If they hold none of these.
        ValueError
            If a projector or adapters come without their base, or all weights come with one.
        """
        if not (with_base and self.has(ADAPTERS, PROJECTOR)):
            self.fetch_weights()
        full = self.has(*_WEIGHTS, "*.index.json")
        if self.has(ADAPTERS) and (with_base or not full):
            if with_base:
                return "adapters"
            base = read_json(self.folder / ADAPTERS).get("base_model_name_or_path")
            raise ValueError(
                f"{self.name} holds LoRA adapters alone: give the model they were trained on as model_base"
                + (f" ({ADAPTERS} says {base})" if base else "")
            )
        if full:
            if with_base:
                raise ValueError(f"{self.name} holds all its weights, neither adapters nor a projector: no model_base")
            return "full"
        if not self.has(PROJECTOR):
            raise OSError(
                f"{self.name} holds no weights: no model.safetensors, pytorch_model.bin, {PROJECTOR} or {ADAPTERS}"
            )
        if not with_base:
            raise ValueError(
                f"{self.name} holds a projector alone: give the language model it was trained with as model_base"
            )
        return "projector"


def resolve_model_path(path: str) -> str:
    """The folder or hub id behind a model's name; "llava-mini" and "llava-mini-reader" are inside this package."""
    if path in EMBEDDED_MODELS and not Path(path).is_dir():
        return str(Path(llava.__file__).parent / "mini" / EMBEDDED_MODELS[path])
    return path


def open_checkpoint(path: str, hub: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a folder, or of a hub id after all but its weights has been fetched, of one commit.

    ``path`` may also be "llava-mini"; ``hub`` holds `HUB_OPTIONS`. An OSError if there is no such checkpoint, or a file
    is a git-LFS pointer.
    """
    path = resolve_model_path(path)
    folder = Path(path)
    if not folder.is_dir():
        refuse_paths(path)
        folder = fetch(path, hub, _SMALL_FILES)
        return Checkpoint(path, folder, {**hub, "revision": folder.name})
    refuse_lfs_notes(folder)
    return Checkpoint(path, folder)


def read_config(path: str, hub: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a folder or hub id as it stands; AutoConfig takes "llava" for an unrelated architecture.

    ``hub`` holds `HUB_OPTIONS`. An OSError or ValueError if the file is not there, or no JSON object.
    """
    if Path(path).is_dir():
        file = Path(path) / "config.json"
        if not file.is_file():
            raise OSError(f"{path} is no checkpoint: it has no config.json")
    else:
        refuse_paths(path)
        try:
            file = Path(cached_file(path, "config.json", **(hub or {})))
        except OSError as error:
            raise _not_on_hub(path, error) from error
    return read_json(file)


def is_of_transformers(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a vision-language model in transformers' own format, and not in LLaVA's."""
    return "vision_config" in config and "mm_vision_tower" not in config


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """A tensor dictionary that torch wrote; no code in it is run. An OSError if the file holds anything else."""
    if not file.is_file():
        raise OSError(f"{file.parent} has no {file.name}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise unreadable(str(file), error) from error


def unreadable(what: str, error: Exception) -> OSError:
    """One sentence on weights that cannot be read, without torch's advice to run the code in them."""
    if isinstance(error, UnpicklingError) and "weights_only" in str(error):
        return OSError(
            f"Cannot read the weights in {what}: they hold more than tensors, which would run as code; convert them to "
            "safetensors where they come from"
        )
    return OSError(f"Cannot read the weights in {what}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def refuse_lfs_notes(folder: Path) -> None:
    """Raise an OSError if a file in a folder is a git-LFS pointer."""
    for file in sorted(item for item in folder.iterdir() if item.suffix in (".safetensors", ".bin", ".model", ".json")):
        with file.open("rb") as content:
            if content.read(len(_LFS_MARK)) == _LFS_MARK:
                raise OSError(f"{file} is a git-LFS pointer, not the file itself: run 'git lfs pull' in {folder}")


def refuse_paths(path: str) -> None:
    """Raise an OSError for what is neither a folder nor looks like a hub id."""
    if Path(path).is_file():
        raise OSError(f"{path} is a file; a checkpoint is a folder or a hub id")
    if path.startswith((".", "/", "~")):
        raise OSError(f"There is no checkpoint folder {path}")


def fetch(path: str, hub: Mapping[str, Any], patterns: list[str]) -> Path:
    """The folder that files of a hub id lie in, once they are here; an OSError if the hub does not give them."""
    # huggingface_hub 1 asks the hub for the files of a commit in offline mode, too.
    here_only = hub.get("local_files_only") or is_offline_mode()
    try:
        return Path(snapshot_download(path, allow_patterns=patterns, **{**hub, "local_files_only": here_only}))
    except (OSError, ValueError) as error:
        raise _not_on_hub(path, error) from error


def _not_on_hub(path: str, error: Exception) -> OSError:
    return OSError(f"{path} is neither a folder nor a checkpoint that the hub gives: {first_line(error)}")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; a ValueError if it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return content
