"""The kept ratio at which another method costs as much as a recipe: tables compare methods at equal FLOPs."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from llava.eval.flops import ModelShape, exact_flops, tokens_per_layer, visual_per_layer
from llava.pruning import PruningConfig
from llava.pruning.methods.fitprune.recipe import Recipe

CLOSE = 0.01
"""By how much a method may miss the recipe's prefill FLOPs that keeps one token and still costs more."""


@dataclass(frozen=True)
class Prefill:
    """A prompt with one picture.

    Attributes
    ----------
    shape : ModelShape
    visual : int
        Its tokens before any leaves.
    text : int
        Text tokens, which all layers see.
    """

    shape: ModelShape
    visual: int
    text: int

    @classmethod
    def of(cls, recipe: Recipe, shape: ModelShape, text: int) -> Prefill:
        """The recipe's.

        Raises
        ------
        ValueError
            If the recipe is for another model.
        """
        recipe.check_layers(shape.decoder.layers)
        if recipe.fixed:
            recipe.check_tokens(shape.visual_tokens)
        return cls(shape, recipe.tokens, text)

    def flops(self, entering: list[int], behind: list[int]) -> int:
        """With so many visual tokens in each layer, and behind its attention."""
        crops = max(1, round(self.visual / self.shape.tower.outputs))
        tokens, left = tokens_per_layer(self.text, entering), tokens_per_layer(self.text, behind)
        return exact_flops(self.shape, tokens, after=left, crops=crops).total

    def unpruned(self) -> int:
        """What it costs if nothing leaves."""
        return self.flops(*[[self.visual] * self.shape.decoder.layers] * 2)

    def with_recipe(self, recipe: Recipe) -> int:
        """What it costs with the recipe."""
        return self.flops(list(recipe.kept[:-1]), list(recipe.kept[1:]))

    def with_method(self, method: str, ratio: float) -> int:
        """What it costs with another method at its usual place.

        Raises
        ------
        ValueError
            If the method takes no ratio, or this one is out of its reach.
        """
        config = PruningConfig.from_text(method, ratio, {})
        return self.flops(*visual_per_layer(config, self.visual, self.shape.decoder.layers))


def equal_ratio(prefill: Prefill, recipe: Recipe, method: str) -> float:
    """The ratio at which ``method`` comes closest to the recipe's FLOPs, with four digits.

    Raises
    ------
    ValueError
        If it cannot be had for as little: a method that drops late costs more than a small recipe.
    """
    wanted = prefill.with_recipe(recipe)
    # What is wrong with the method itself is found here, not taken for a ratio out of its reach.
    prefill.with_method(method, 1.0)

    def cost(ratio: float) -> int:
        try:
            return prefill.with_method(method, ratio)
        except ValueError:
            return 0

    ratios = [round(kept / prefill.visual, 4) for kept in range(1, prefill.visual + 1)]
    place = bisect_left(ratios, wanted, hi=len(ratios) - 1, key=cost)
    near = [ratio for ratio in ratios[max(0, place - 1) : place + 1] if cost(ratio)]
    if (cheaper := cost(near[0])) > (1 + CLOSE) * wanted:
        whole = prefill.unpruned()
        raise ValueError(
            f"{method} costs more than {recipe.name} at any ratio: at least {cheaper / whole:.2%} of the unpruned "
            f"prefill, not {wanted / whole:.2%}"
        )
    return min(near, key=lambda ratio: abs(cost(ratio) - wanted))
