"""Pruners in the format of the published code: a PyTorch state dict, and sizes in JSON or YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava.pruning.methods.ocvtp.network import SlotConfig, SlotPruner

PUBLISHED_LAYER = 8
"""Vision-encoder layer that published pruners read by default."""

PRUNER_NAMES = {
    "encode_project.mlp.": "project.",
    "initializ.": "initial.",
    "aggregat.norm_in.": "attention.norm_tokens.",
    "aggregat.norm_slots_0.": "attention.norm_queries.",
    "aggregat.norm_slots_1.": "attention.norm_feed_forward.",
    "aggregat.proj_q.": "attention.query.",
    "aggregat.proj_k.": "attention.key.",
    "aggregat.proj_v.": "attention.value.",
    "aggregat.gru.": "attention.gru.",
    "aggregat.ffn.mlp.": "attention.feed_forward.",
}
SIZE_NAMES = {
    "enc_in_dim": "width",
    "agg_ffn_dim": "feed_forward",
    "agg_num_iter": "iterations",
    "init_num": "slots",
}
"""Of a published configuration, beside ``enc_dims``, which holds two sizes."""

_EVERY_PRUNER_HAS = "encode_project.mlp.1.weight"


def renamed(weights: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The weights whose published names begin as in ``names``, under ours; the others are left out."""
    found = {}
    for name, value in weights.items():
        for published, own in names.items():
            if name.startswith(published):
                found[own + name.removeprefix(published)] = value
    return found


def load_published(file: Path, sizes: Path | None = None) -> SlotPruner:
    """A published pruner; the decoder's weights, where there are any, are left out.

    ``file`` is a ``torch.save`` of a state dict; ``sizes`` the JSON or YAML file that the published code builds the
    network from. Without it the sizes are those of the weights, and the iterations three. An OSError or ValueError if a
    file is missing, unreadable, or holds something else.
    """
    weights = renamed(_read_weights(file), PRUNER_NAMES)
    try:
        (hidden, width), (slot_width, _), (feed_forward, _) = (
            weights[name].shape for name in ("project.1.weight", "project.4.weight", "attention.feed_forward.0.weight")
        )
    except KeyError as error:
        raise ValueError(f"{file} is no OC-VTP pruner: it has no weights {error}") from None
    except (AttributeError, ValueError):
        raise ValueError(f"{file} is no OC-VTP pruner: its weights have other shapes") from None
    found = {"width": width, "hidden": hidden, "slot_width": slot_width, "feed_forward": feed_forward}
    given = {} if sizes is None else _read_sizes(sizes)
    for name, size in found.items():
        if given.get(name, size) != size:
            raise ValueError(f"{sizes} states {name} {given[name]}, but the weights in {file} have {size}")
    config = SlotConfig(**found | given, layer=PUBLISHED_LAYER, trained_on={"published": file.name})
    return SlotPruner.from_weights(config, weights, str(file))


def _read_weights(file: Path) -> Mapping[str, torch.Tensor]:
    if not file.is_file():
        raise OSError(f"There is no pruner {file}")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # PyTorch's own message recommends to run the code in the file.
        raise OSError(f"Cannot read {file} as PyTorch weights: it is damaged, or holds more than weights") from error
    for name in ("state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(name), Mapping):
            weights = weights[name]
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{file} holds no state dict")
    return _unwrapped(weights)


def _unwrapped(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what stands before every name where the network was saved inside another module, as ``module.``."""
    wrappers = [name.removesuffix(_EVERY_PRUNER_HAS) for name in weights if name.endswith(_EVERY_PRUNER_HAS)]
    wrapper = min(wrappers, key=len, default="")
    return {name.removeprefix(wrapper): value for name, value in weights.items() if name.startswith(wrapper)}


def _read_sizes(file: Path) -> dict[str, Any]:
    """What a configuration file of the published code states of the pruner, under our names."""
    import yaml

    if not file.is_file():
        raise OSError(f"There is no pruner configuration {file}")
    try:
        # What is JSON is YAML, but for tabs.
        values = yaml.safe_load(file.read_text(encoding="utf-8").replace("\t", " "))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} is not valid JSON or YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} does not hold the settings of an OC-VTP pruner")
    if values.get("enc_ln", "pre") != "pre":
        raise ValueError(f"{file}: enc_ln must be 'pre', the published layout, not {values['enc_ln']!r}")
    found = {own: _size(file, name, values[name]) for name, own in SIZE_NAMES.items() if values.get(name) is not None}
    dims = values.get("enc_dims")
    if dims is None:
        return found
    if not isinstance(dims, list) or len(dims) != 2:
        raise ValueError(f"{file}: enc_dims must be the widths of two layers, not {dims!r}")
    hidden, slot_width = (_size(file, "enc_dims", size) for size in dims)
    return found | {"hidden": hidden, "slot_width": slot_width}


def _size(file: Path, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{file}: {name} must be a whole number >= 1, not {value!r}")
    return value
