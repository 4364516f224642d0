"""The folder of a small trained network: ``config.json``, which states its kind, and ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from llava.files import atomic_write, write_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Network = TypeVar("Network", bound=nn.Module)


def read_config(folder: Path, model_type: str, kind: str) -> dict[str, Any]:
    """What ``config.json`` says of a network, without its ``model_type``, which must be the given one.

    ``kind`` is what errors call it, with its article. An OSError if there is none, a ValueError if it describes
    something else.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise OSError(f"{folder} is not {kind}: it has no {CONFIG}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or values.pop("model_type", None) != model_type:
        raise ValueError(f"{file} does not describe {kind} (model_type {model_type!r})")
    return values


def read_weights(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of ``model.safetensors``; an `OSError` where it is missing or unreadable."""
    file = folder / WEIGHTS
    try:
        return load_file(file)
    except FileNotFoundError:
        raise OSError(f"{folder} is not {kind}: it has no {WEIGHTS}") from None
    except SafetensorError as error:
        raise OSError(f"Cannot read {file}: {error}") from error


def filled(network: Network, weights: Mapping[str, torch.Tensor], source: str) -> Network:
    """The network with these weights in float32, in eval mode; a `ValueError` if they are another's."""
    try:
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n", 1)[-1].split())
        raise ValueError(f"{source} does not hold the weights of this network: {reason}") from error
    return network.eval()


def save_network(network: nn.Module, folder: Path, dtype: torch.dtype, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` and ``model.safetensors``, with weights of a dtype; each whole or not at all."""
    weights = {name: value.detach().cpu().to(dtype).contiguous() for name, value in network.state_dict().items()}
    write_json(folder / CONFIG, config)
    atomic_write(folder / WEIGHTS, lambda part: save_file(weights, part))
