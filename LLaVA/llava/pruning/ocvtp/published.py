"""Pruners in the format of the published code: a PyTorch state dict, and sizes in JSON or YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava.pruning.ocvtp.config import SlotConfig
from llava.pruning.ocvtp.network import SlotPruner

PUBLISHED_LAYER = 8
"""Vision-encoder layer that published pruners read unless told otherwise."""

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
DECODER_NAMES = {
    "decode.mask_token": "mask_token",
    "decode.posit_embed._pe": "positions",
    "decode.project1.project.": "token_projection.0.",
    "decode.project1.norm.": "token_projection.1.",
    "decode.project2.project.": "slot_projection.0.",
    "decode.project2.norm.": "slot_projection.1.",
    "decode.norm0.": "norm.",
    "decode.backbone.layers.": "layers.",
}


def renamed(weights: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The weights whose published names begin as in ``names``, under ours; the others are left out."""
    found = {}
    for name, value in weights.items():
        name = name.removeprefix("module.")
        for published, own in names.items():
            if name.startswith(published):
                found[own + name.removeprefix(published)] = value
    return found


def load_published(file: Path, sizes: Path | None = None) -> SlotPruner:
    """A published pruner; the decoder's weights, where there are any, are left out.

    Parameters
    ----------
    file : Path
        ``torch.save`` of a state dict.
    sizes : Path, optional
        The JSON or YAML file that the published code builds the network from. Without it the sizes are those of the
        weights, and the iterations three.

    Returns
    -------
    SlotPruner
        Its configuration does not know the encoder layer.

    Raises
    ------
    OSError
        If a file is missing or unreadable.
    ValueError
        If it holds something else.
    """
    weights = renamed(_read_weights(file), PRUNER_NAMES)
    try:
        found = {
            "width": weights["project.1.weight"].shape[1],
            "hidden": weights["project.1.weight"].shape[0],
            "slot_width": weights["project.4.weight"].shape[0],
            "feed_forward": weights["attention.feed_forward.0.weight"].shape[0],
        }
    except KeyError as error:
        raise ValueError(f"{file} is no OC-VTP pruner: it has no weights {error}") from None
    given = {} if sizes is None else _read_sizes(sizes)
    for name, size in found.items():
        if given.get(name, size) != size:
            raise ValueError(f"{sizes} says {name} {given[name]}, but the weights in {file} have {size}")
    config = SlotConfig(**found | given, layer=None, trained_on={"published": file.name})
    return SlotPruner.from_weights(config, weights, str(file))


def _read_weights(file: Path) -> Mapping[str, torch.Tensor]:
    if not file.is_file():
        raise OSError(f"There is no pruner {file}")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"Cannot read {file} as PyTorch weights: {reason}") from error
    for name in ("state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(name), Mapping):
            weights = weights[name]
    if not isinstance(weights, Mapping):
        raise ValueError(f"{file} holds no state dict")
    return weights


def _read_sizes(file: Path) -> dict[str, Any]:
    """What a configuration file of the published code says of the pruner, under our names."""
    if not file.is_file():
        raise OSError(f"There is no pruner configuration {file}")
    values = _read_yaml(file) if file.suffix in (".yaml", ".yml") else _read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file} does not hold the settings of an OC-VTP pruner")
    if values.get("enc_ln", "pre") != "pre":
        raise ValueError(f"{file}: enc_ln must be 'pre', the published layout, not {values['enc_ln']!r}")
    dims = values.get("enc_dims") or [None, None]
    found = {
        "width": values.get("enc_in_dim"),
        "hidden": dims[0],
        "slot_width": dims[-1],
        "feed_forward": values.get("agg_ffn_dim"),
        "iterations": values.get("agg_num_iter"),
        "slots": values.get("init_num"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def _read_yaml(file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"reading {file} needs the package pyyaml: pip install 'llava[train]'") from error
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
