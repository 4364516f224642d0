"""DPP: the most probable subset under a determinantal point process of cosine similarities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.model.llava_arch import greedy_select
from llava.pruning.base import Pruner, VisualTokens
from llava.pruning.methods.divprune import cosine_similarity


@dataclass(frozen=True, kw_only=True)
class DPP(Pruner):
    """Greedy maximisation of the determinant of the cosine-similarity kernel.

    The kernel has rank at most D: once what is left is explained by what was taken (more tokens than dimensions, or
    only duplicates), gains are rounding errors, and the rest of the budget is filled by them.
    """

    source: ClassVar[str] = "greedy MAP of a DPP (Chen, Zhang and Zhou, NeurIPS 2018), a baseline of OTPrune's figure 3"

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        kernel = cosine_similarity(tokens.features)
        diagonal = kernel.diagonal(dim1=-2, dim2=-1)
        # A token's cosine with itself is 1, not 1 and a rounding error that would decide the first pick.
        diagonal.copy_((diagonal > 0.5).to(kernel.dtype))
        return greedy_select(kernel, tokens.k)
