"""Networks that methods need, untrained and as small as `tiny_llava`'s vision tower."""

from __future__ import annotations

from pathlib import Path

import torch

from llava.fitting.scorer.train import save_scorer
from llava.pruning.methods.scorer import TokenScorer
from tiny_ocvtp import WIDTH, save_pruner


def trained_networks(folder: Path) -> dict[str, dict[str, str]]:
    """Options of the methods that read a network, written below ``folder``."""
    return {
        "ocvtp": {"checkpoint": save_pruner(folder / "pruner")},
        "scorer": {"checkpoint": save_tiny_scorer(folder / "scorer")},
    }


def save_tiny_scorer(folder: Path, width: int = WIDTH, seed: int = 22) -> str:
    """Write a random scorer into a folder."""
    torch.manual_seed(seed)
    save_scorer(TokenScorer(width, 6), folder, {})
    return str(folder)
