"""Recipes as a picture: visual tokens by layer, and divergence against budget; with a CSV of what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava import files
from llava.pruning.methods.fitprune.recipe import Recipe

COLUMNS = (
    "recipe",
    "reduction_ratio",
    "mean_fraction",
    "layer",
    "tokens",
    "deleted",
    "divergence_visual",
    "divergence_text",
    "divergence_mean",
)


def by_budget(recipes: Sequence[Recipe]) -> list[Recipe]:
    """In ascending order of what they save.

    Raises
    ------
    ValueError
        If they are of different models.
    """
    first = recipes[0]
    for recipe in recipes:
        if (recipe.layers, recipe.tokens) != (first.layers, first.tokens):
            raise ValueError(
                f"recipes of one model go together: {first.name} has {first.layers} layers and {first.tokens} visual "
                f"tokens, {recipe.name} {recipe.layers} and {recipe.tokens}"
            )
    return sorted(recipes, key=lambda recipe: -recipe.mean_fraction)


def draw(recipes: Sequence[Recipe]):
    """A figure: tokens that enter each layer's attention, a line a recipe; mean divergence of those that know it.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    tokens, divergence = figure.subplots(1, 2)
    for recipe in recipes:
        tokens.step(range(recipe.layers), recipe.kept[:-1], where="mid", marker=".", label=_label(recipe))
    tokens.set(xlabel="decoder layer", ylabel="visual tokens in its attention", ylim=(0, None))
    tokens.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*tokens.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=6)
    known = [recipe for recipe in recipes if "divergence" in recipe.facts]
    saved = [100 * recipe.facts["flops"]["visual"]["reduction_ratio"] for recipe in known]
    for name, marker in (("visual", "s"), ("text", "^"), ("mean", "o")):
        values = [100 * _mean(recipe.facts["divergence"][name]) for recipe in known]
        divergence.plot(saved, values, marker=marker, label="both" if name == "mean" else f"from {name} tokens")
    divergence.set(xlabel="FLOPs over visual tokens saved (%)", ylabel="attention lost (%)", ylim=(0, None))
    if known:
        divergence.legend(fontsize=8)
    return figure


def write_csv(file: Path, recipes: Sequence[Recipe]) -> None:
    """One line a recipe and layer, and what it is; empty where the recipe does not know."""
    lines = []
    for recipe in recipes:
        facts = recipe.facts
        saved = facts["flops"]["visual"]["reduction_ratio"] if "flops" in facts else None
        lost = facts.get("divergence", {})
        for layer, deleted in enumerate(recipe.deleted):
            here = [lost[name][layer] if lost else None for name in ("visual", "text")]
            counts = recipe.mean_fraction, layer, recipe.kept[layer], deleted
            lines.append([recipe.name, saved, *counts, *here, lost.get("mean")])
    files.write_csv(file, COLUMNS, lines)


def _label(recipe: Recipe) -> str:
    budget = recipe.facts.get("budget")
    if budget is None:
        return recipe.name
    (name, value), *_ = budget.items()
    return f"{name.replace('_', ' ')} {value:g}"


def _mean(values: float | Sequence[float]) -> float:
    return values if isinstance(values, float) else sum(values) / len(values)
