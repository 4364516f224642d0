"""The names of weights on disk, which other programs look them up by."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open


def weight_names(folder: Path) -> set[str]:
    """Names of the weights in a checkpoint folder, N for the number of a layer."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names |= set(weights.keys())
    for file in folder.glob("pytorch_model*.bin"):
        names |= set(torch.load(file, weights_only=True))
    # Early checkpoints also hold the rotary embedding's frequencies, which no program reads.
    return {re.sub(r"\.layers\.\d+\.", ".layers.N.", name) for name in names if "rotary_emb" not in name}
