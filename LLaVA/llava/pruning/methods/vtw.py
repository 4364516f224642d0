"""VTW: at one layer, all visual tokens leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.pruning.base import INSIDE, Pruner
from llava.pruning.schedule import Schedule
from llava.pruning.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class VTW(Pruner):
    """Visual tokens withdrawal: layers below K see every visual token, layers from K on see none.

    K is LAYER_INDEX; or it follows from SUBSET_RATIO, the mean over the L layers of the fraction of tokens present,
    which is K / L here: K = max(1, round(r L)), so that a ratio is met to within half a layer, and one that rounds to
    K = L withdraws nothing. The paper's K is 15 of 32 layers, found on a few examples by comparing outputs.
    """

    where: ClassVar[str] = INSIDE
    source: ClassVar[str] = "VTW, visual tokens withdrawal, arXiv 2405.05803"
    venue: ClassVar[str] = "AAAI"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "none"
    first_layer: ClassVar[int] = 1
    default_layer: ClassVar[int | None] = None

    def check_budget(self, ratio: float | None, layer: int | None) -> None:
        if ratio is None and layer is None:
            raise ValueError(
                "give LAYER_INDEX, the layer at which all visual tokens leave, or SUBSET_RATIO, the fraction of the "
                "decoder's layers that see them"
            )
        if ratio is not None and layer is not None:
            raise ValueError(
                f"give LAYER_INDEX={layer} or SUBSET_RATIO={ratio:g}, not both: the layer at which all visual tokens "
                "leave is the budget"
            )

    def schedule_for(self, ratio: float | None, layer: int | None, num_layers: int) -> Schedule:
        if layer is None:
            assert ratio is not None  # check_budget's
            layer = max(self.first_layer, round(ratio * num_layers))
            if layer >= num_layers:
                return ((num_layers - 1, 1.0),)
        return ((layer, 0.0),)

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        raise NotImplementedError(
            "VTW withdraws all visual tokens at a decoder layer and chooses none of them: it works inside a model only "
            "(BASELINE=VTW or pruning(model, ...))"
        )
