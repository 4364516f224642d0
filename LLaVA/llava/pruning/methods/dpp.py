"""DPP: the most probable subset under a determinantal point process of cosine similarities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import Pruner
from llava.pruning.similarity import cosine_kernel, greedy_map
from llava.pruning.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class DPP(Pruner):
    """Greedy maximisation of the determinant of the cosine-similarity kernel."""

    source: ClassVar[str] = "greedy MAP of a DPP, a baseline of OTPrune's figure 3"
    venue: ClassVar[str] = "NeurIPS"
    year: ClassVar[int] = 2018
    cost: ClassVar[str] = "O(N^2 D), greedy O(k^2 N)"

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        return greedy_map(cosine_kernel(tokens.features), tokens.k)
