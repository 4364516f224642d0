"""What a stage of the recipe does: its steps, learning rates and optimisers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Stage:
    """What one stage of the recipe does, from the configuration file.

    Attributes
    ----------
    name : str
    steps : int
        Optimiser steps in all.
    batch : int
        Images a step, over all processes.
    learning_rate : float
        Of everything that AdamW trains: embeddings, norms, biases, heads.
    matrix_learning_rate : float
        Of the layers' weight matrices, which Muon trains (in AdamW's scale).
    first_seed : int
        Of the stage's images; no two stages share one.
    warmup, decay : float
        Fractions of the steps: a linear rise at the beginning, a linear fall to zero at the end.
    weight_decay : float
    clip : float
        Largest norm of a step's gradient.

    Raises
    ------
    ValueError
        For a number out of range.
    """

    name: str
    steps: int
    batch: int
    learning_rate: float
    matrix_learning_rate: float
    first_seed: int = 0
    warmup: float = 0.02
    decay: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self):
        for name, least in (("steps", 1), ("batch", 1), ("first_seed", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number >= {least}, not {getattr(self, name)!r}")
        for name in ("learning_rate", "matrix_learning_rate", "warmup", "decay", "weight_decay", "clip"):
            value, most = getattr(self, name), 1 if name in ("warmup", "decay") else math.inf
            if not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ValueError(f"{name} must be a number {'from 0 to 1' if most == 1 else '>= 0'}, not {value!r}")


def learning_rate_factor(step: int, stage: Stage) -> float:
    """Warm-up, plateau, linear decay to zero: the share of the learning rate that step `step` (from 0) takes.

    A plateau instead of a cosine: a run can be made longer or shorter until its decay begins.
    """
    rise = min(1.0, (step + 1) / max(1.0, stage.warmup * stage.steps))
    fall = min(1.0, (stage.steps - step) / max(1.0, stage.decay * stage.steps))
    return rise * fall


def make_optimizers(task: nn.Module, matrices: Iterable[nn.Parameter], stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for `matrices`, AdamW for every other trainable parameter of `task`."""
    chosen = list(matrices)
    known = {id(p) for p in chosen}
    rest = [p for p in task.parameters() if p.requires_grad and id(p) not in known]
    decay = stage.weight_decay
    muon = torch.optim.Muon(
        chosen, stage.matrix_learning_rate, decay, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(rest, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=decay)]
