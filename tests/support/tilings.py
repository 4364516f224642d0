"""Symmetric products cut up as told."""

from __future__ import annotations

import torch

from llava.pruning.kernels import symmetric


def ot_kernel_in(tiling: symmetric.Tiling, x: torch.Tensor, gamma: float) -> torch.Tensor:
    """`symmetric.ot_kernel` with tiles of one kind."""
    usual, symmetric.TILINGS = symmetric.TILINGS, (tiling,)
    try:
        return symmetric.ot_kernel(x, gamma)
    finally:
        symmetric.TILINGS = usual
