"""FitPrune: a recipe, fitted to a budget on a few examples, states how many visual tokens leave in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch

from llava.pruning.base import INSIDE, Pruner
from llava.pruning.methods.fitprune.recipe import Recipe, describe, read_recipe, recipe_digest, scalable
from llava.pruning.schedule import Schedule, scaled
from llava.pruning.tokens import VisualTokens

FITTER = ("llava.fitting.fitprune.fit", "fit_for")
"""Module and function that fit a recipe, imported only when one is fitted: they stand above the model."""

USUAL_SAMPLES = 64


def importance(visual_attention: torch.Tensor, text_attention: torch.Tensor) -> torch.Tensor:
    """Product of what a token receives from its image's tokens and from the text: (..., N), (..., N) -> (..., N)."""
    return visual_attention.float() * text_attention.float()


def expendable(attention: torch.Tensor, least: float) -> torch.Tensor:
    """The tokens with the least attention (N,) which may go while what the others receive adds up to ``least``.

    Returns
    -------
    Tensor (N,), bool
        The longest run in ascending order of attention (ties: the highest index goes first) with the rest at or above
        ``least``, but for one token at least, which stays.
    """
    order = attention.flip(0).argsort(stable=True)
    order = len(attention) - 1 - order
    wide = attention.double()
    left = wide.sum() - wide[order].cumsum(0)  # (N,) after each step
    steps = int((left >= least).sum().clamp_max(len(attention) - 1))
    gone = torch.zeros_like(attention, dtype=torch.bool)
    gone[order[:steps]] = True
    return gone


def deletable(
    visual_attention: torch.Tensor, text_attention: torch.Tensor, unpruned: tuple[float, float], alpha: float
) -> torch.Tensor:
    """What a layer can lose while both kinds of attention keep the share 1 - alpha of the unpruned model's: (N,), bool.

    The tokens that are `expendable` to both. The attention is (N,), received by the tokens that are left; ``unpruned``
    are the sums of the two in the unpruned model.
    """
    visual, text = ((1 - alpha) * total for total in unpruned)
    return expendable(visual_attention, visual) & expendable(text_attention, text)


@dataclass(frozen=True, kw_only=True)
class FitPrune(Pruner):
    """In every layer, as many visual tokens as a recipe states leave after the attention: the least important ones.

    Importance is the product of two sums of that layer's attention, in the head where it is strongest: what the image's
    present tokens pay a token, and what the text after the image pays it. The layer's attention, keys and values are
    those of all its tokens; its feed-forward block and everything deeper see the rest.

    Give one of ``recipe``, ``reduction_ratio`` and SUBSET_RATIO (or a recipe to ``scale`` to SUBSET_RATIO). Without a
    recipe one is fitted to the model when it is loaded, on the embedded data, and kept in the user's cache folder.

    Attributes
    ----------
    recipe : str or None
        A file of ``python -m llava.fitting.fitprune fit``, or a known name such as llava-1.5-7b/60, a published one.
    reduction_ratio : float or None
        Share of the decoder's FLOPs over visual tokens that is to be saved, 0 <= ratio < 1; as published.
    scale : bool
        Scale the recipe to SUBSET_RATIO, as `llava.pruning.schedule.scaled` does with other methods' schedules.
    samples : int
        Images with a question each that a recipe is fitted on.
    """

    where: ClassVar[str] = INSIDE
    needs: ClassVar[frozenset[str]] = frozenset({"visual_attention", "text_attention"})
    source: ClassVar[str] = "FitPrune, arXiv 2409.10197"
    venue: ClassVar[str] = "AAAI"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "O(T^2) per layer that drops, for T tokens of the prompt"
    first_layer: ClassVar[int] = 1
    default_layer: ClassVar[int | None] = None
    after_attention: ClassVar[bool] = True

    recipe: str | None = None
    reduction_ratio: float | None = None
    scale: bool = False
    samples: int = USUAL_SAMPLES

    def __post_init__(self):
        if self.reduction_ratio is not None and not 0 <= self.reduction_ratio < 1:
            raise ValueError(f"FITPRUNE_REDUCTION_RATIO must be a number with 0 <= r < 1, not {self.reduction_ratio!r}")
        if self.samples < 1:
            raise ValueError(f"FITPRUNE_SAMPLES must be at least 1, not {self.samples!r}")

    def check_budget(self, ratio: float | None, layer: int | None) -> None:
        if layer is not None:
            raise ValueError(f"LAYER_INDEX={layer} must be left out: the recipe states what each layer drops")
        given = {
            "FITPRUNE_RECIPE": self.recipe,
            "FITPRUNE_REDUCTION_RATIO": self.reduction_ratio,
            "SUBSET_RATIO": ratio,
        }
        given = {name: value for name, value in given.items() if value is not None}
        wanted = {"FITPRUNE_RECIPE", "SUBSET_RATIO"} if self.scale else None
        if wanted is not None and set(given) != wanted:
            raise ValueError("FITPRUNE_SCALE=1 takes FITPRUNE_RECIPE and SUBSET_RATIO, and nothing else")
        if wanted is None and len(given) != 1:
            found = " and ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
            raise ValueError(
                "give one of FITPRUNE_RECIPE (a file, or a known name), FITPRUNE_REDUCTION_RATIO (share of the FLOPs "
                "over visual tokens that is saved) and SUBSET_RATIO (mean over the layers of the fraction of visual "
                f"tokens present), not {found}"
            )
        if self.recipe is not None:
            self._recipe()

    def schedule_for(self, ratio: float | None, layer: int | None, num_layers: int) -> Schedule:
        if self.recipe is None:
            if ratio is not None and ratio * num_layers <= 1:
                raise ValueError(
                    f"SUBSET_RATIO={ratio:g} is out of reach in a decoder of {num_layers} layers: the first layer's "
                    f"attention sees every token, so the mean over the layers stays above 1/{num_layers}"
                )
            return ()
        recipe = self._recipe()
        recipe.check_layers(num_layers)
        if not self.scale:
            return recipe.schedule
        assert ratio is not None  # check_budget's
        return scaled(scalable(recipe), ratio, num_layers, self.first_layer, published_layers=num_layers)

    def fit(self, model: Any, ratio: float | None) -> Schedule:
        module, function = FITTER
        recipe: Recipe = getattr(import_module(module), function)(model, self.reduction_ratio, ratio, self.samples)
        return recipe.schedule

    def check_model(self, image_tokens: int | None, encoder_width: int | None) -> None:
        if self.recipe is not None:
            self._recipe().check_tokens(image_tokens)

    def advice(self, model: Any) -> list[str]:
        if self.recipe is None or self.scale:
            return []
        recipe = self._recipe()
        lines = [f"{self.recipe}: {describe(recipe)}"]
        if recipe.of_other_weights(model):
            lines.append(f"{self.recipe} was fitted to other weights than these; python -m llava.fitting.fitprune fit")
        return lines

    def digests(self) -> dict[str, str]:
        return {} if self.recipe is None else {"recipe": recipe_digest(self._recipe())}

    def _recipe(self) -> Recipe:
        assert self.recipe is not None
        try:
            return read_recipe(self.recipe)
        except ValueError as error:
            raise ValueError(f"FITPRUNE_RECIPE={self.recipe}: {error}") from None

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        scores = importance(tokens.visual_attention, tokens.text_attention)  # (B, N)
        return scores.argsort(dim=-1, descending=True, stable=True)[:, : tokens.k]
