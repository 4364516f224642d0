"""Recipes beside each other in a figure, and beside other methods at equal FLOPs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.files import atomic_write
from llava.flops import ModelShape, exact_flops, tokens_per_layer, visual_per_layer
from llava.pruning import PruningConfig
from llava.pruning.methods.fitprune.recipe import Recipe

CLOSE = 0.01
"""By how much a method may miss the recipe's prefill FLOPs that keeps one token and still costs more."""


@dataclass(frozen=True)
class Prefill:
    """A prompt with one image, of ``visual`` tokens before any leaves, and ``text`` tokens, which all layers see."""

    shape: ModelShape
    visual: int
    text: int

    @classmethod
    def of(cls, recipe: Recipe, shape: ModelShape, text: int) -> Prefill:
        """The recipe's; a `ValueError` if that is for another model."""
        recipe.check_layers(shape.decoder.layers)
        if recipe.fixed:
            recipe.check_tokens(shape.visual_tokens)
        return cls(shape, recipe.tokens, text)

    def flops(self, entering: Sequence[int], after: Sequence[int]) -> int:
        """With so many visual tokens in each layer, and after its attention."""
        crops = max(1, round(self.visual * self.shape.crops / self.shape.visual_tokens))
        tokens, left = tokens_per_layer(self.text, entering), tokens_per_layer(self.text, after)
        return exact_flops(self.shape, tokens, after=left, crops=crops).total

    def unpruned(self) -> int:
        """What it costs if nothing leaves."""
        return self.flops(*[[self.visual] * self.shape.decoder.layers] * 2)

    def with_recipe(self, recipe: Recipe) -> int:
        """What it costs with the recipe."""
        return self.flops(recipe.kept[:-1], recipe.kept[1:])

    def with_method(self, method: str, ratio: float) -> int:
        """What it costs with another method at its usual place; a `ValueError` if the ratio is out of its reach."""
        config = PruningConfig.from_text(method, ratio, {})
        return self.flops(*visual_per_layer(config, self.visual, self.shape.decoder.layers))


def equal_ratio(prefill: Prefill, recipe: Recipe, method: str) -> float:
    """The ratio at which ``method`` comes closest to the recipe's FLOPs, with four digits.

    A ValueError if it cannot be had for as little: a method that drops late costs more than a small recipe.
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


def draw(recipes: Sequence[Recipe], png: Path) -> Path:
    """Tokens that enter each layer's attention, and the attention lost by budget; returns the CSV beside the figure.

    A ValueError if the recipes are of different models.
    """
    import pandas
    from matplotlib.figure import Figure

    first = recipes[0]
    for recipe in recipes:
        if (recipe.layers, recipe.tokens) != (first.layers, first.tokens):
            raise ValueError(
                f"recipes of one model go together: {first.name} has {first.layers} layers and {first.tokens} visual "
                f"tokens, {recipe.name} {recipe.layers} and {recipe.tokens}"
            )
    recipes = sorted(recipes, key=lambda recipe: -recipe.mean_fraction)
    table = pandas.concat([_table(recipe) for recipe in recipes])
    figure = Figure(figsize=(10, 4), layout="constrained")
    tokens, lost = figure.subplots(1, 2)
    for name, rows in table.groupby("recipe", sort=False):
        tokens.step(rows["layer"], rows["tokens"], where="mid", marker=".", label=name)
    tokens.set(xlabel="decoder layer", ylabel="visual tokens in its attention", ylim=(0, None))
    figure.legend(*tokens.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=6)
    by_budget = 100 * table.groupby("recipe", sort=False).mean().set_index("reduction_ratio").filter(like="divergence")
    for (column, values), marker in zip(by_budget.items(), "s^o", strict=True):
        label = column.removeprefix("divergence_").replace("mean", "both")
        lost.plot(100 * by_budget.index, values, marker=marker, label=label)
    lost.set(xlabel="FLOPs over visual tokens saved (%)", ylabel="attention lost (%)", ylim=(0, None))
    lost.legend(title="from visual tokens, text tokens", fontsize=8)
    csv = png.with_suffix(".csv")
    atomic_write(png, lambda part: figure.savefig(part, format="png", dpi=130))
    atomic_write(csv, table.to_csv(index=False))
    return csv


def _table(recipe: Recipe):
    """One row per layer; empty where the recipe does not state it."""
    import pandas

    lost = recipe.metadata.get("divergence", {})
    return pandas.DataFrame(
        {
            "recipe": recipe.name,
            "reduction_ratio": recipe.metadata.get("flops", {}).get("visual", {}).get("reduction_ratio", float("nan")),
            "mean_fraction": recipe.mean_fraction,
            "layer": range(recipe.layers),
            "tokens": recipe.kept[:-1],
            "deleted": recipe.deleted,
            **{f"divergence_{kind}": lost.get(kind, float("nan")) for kind in ("visual", "text", "mean")},
        }
    )
