"""Modules whose weights accelerate keeps elsewhere, and brings to the device that computes when they are called."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """The device that a module computes on; where its weights are offloaded, they themselves are on "meta"."""
    weight = next(module.parameters(), None)
    if weight is None or not weight.is_meta:
        return torch.device("cpu") if weight is None else weight.device
    hooks = (hook for each in module.modules() for hook in _hooks(each))
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), weight.device))


def parameter_here(model: nn.Module, name: str) -> torch.Tensor:
    """A model's parameter by name, fetched if it is offloaded: what no module's forward uses, no hook brings.

    Raises
    ------
    ValueError
        If its value is nowhere.
    """
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        return parameter
    for hook in (hook for each in model.modules() for hook in _hooks(each)):
        weights = getattr(hook, "weights_map", None)
        weights = getattr(weights, "dataset", weights) or {}  # without the prefix of the hook's module
        # The model may be inside another one, peft's for instance.
        key = next((key for key in weights if key == name or key.endswith(f".{name}")), None)
        if key is not None:
            return weights[key]
    raise ValueError(f"{name} is on the meta device, and nothing keeps its value")


def _hooks(module: nn.Module) -> Iterator:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
