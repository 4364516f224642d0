"""Writing the folder of a small trained network, as `llava.pruning.methods.trained` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from llava.files import atomic_write, write_json
from llava.pruning.methods.trained import CONFIG, WEIGHTS


def save_network(network: nn.Module, folder: Path, dtype: torch.dtype, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` and ``model.safetensors``, with weights of a dtype; each whole or not at all."""
    weights = {name: value.detach().cpu().to(dtype).contiguous() for name, value in network.state_dict().items()}
    write_json(folder / CONFIG, config)
    atomic_write(folder / WEIGHTS, lambda part: save_file(weights, part))
