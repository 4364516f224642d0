"""OC-VTP pruners small enough to run and to train in a blink."""

from __future__ import annotations

from pathlib import Path

import torch

from llava.fitting.ocvtp import train
from llava.pruning.methods.ocvtp.network import SlotConfig, SlotPruner

WIDTH = 32
"""Of the features of `tiny_llava`'s vision tower."""


def tiny_config(width: int = WIDTH, layer: int | None = 0, tokens: int = 16, **overrides) -> SlotConfig:
    """A pruner of slot width 16 for pictures of 16 patches."""
    decoder = {"tokens": tokens, "width": width, "heads": 2, "layers": 2, "feed_forward": 24, "context": 2}
    settings = {"hidden": 24, "slot_width": 16, "feed_forward": 24, "slots": 4, "decoder": decoder, "layer": layer}
    return SlotConfig(width=width, **settings | overrides)


def tiny_pruner(**settings) -> SlotPruner:
    """A random pruner whose slots differ."""
    torch.manual_seed(21)
    pruner = SlotPruner(tiny_config(**settings))
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.mul_(2)
    return pruner.eval()


def save_pruner(folder: Path, **settings) -> str:
    """Write `tiny_pruner` into a folder."""
    train.save_pruner(tiny_pruner(**settings), folder)
    return str(folder)
