"""Fit a recipe: gather statistics, search, settle on whole tokens, predict, and write it all down."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from llava.eval.flops import DecoderShape, ModelShape, exact_flops, tokens_per_layer
from llava.files import atomic_write
from llava.fitting.fitprune.samples import Samples
from llava.fitting.fitprune.search import TOKENS, Cost, Walk, kept_by, least_share, search, settle, visual_flops
from llava.fitting.fitprune.sources import MINI, open_source
from llava.fitting.fitprune.statistics import Statistics, cache_root
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import EMBEDDED_MODEL, resolve_model_path
from llava.pruning.methods.fitprune.recipe import FORMAT, SHIPPED_FOLDER, Recipe, describe, parse_recipe, read_recipe
from llava.runtime import is_main_process


@dataclass(frozen=True)
class Budget:
    """What a recipe may spend: one of the two.

    Attributes
    ----------
    reduction_ratio : float or None
        Share that is saved of the decoder's FLOPs over visual tokens, 0 <= ratio < 1.
    subset_ratio : float or None
        Mean over the layers of the fraction of visual tokens present, 0 < ratio <= 1.

    Raises
    ------
    ValueError
        For both or neither, or one out of range.
    """

    reduction_ratio: float | None = None
    subset_ratio: float | None = None

    def __post_init__(self):
        if (self.reduction_ratio is None) == (self.subset_ratio is None):
            raise ValueError("a budget is a reduction ratio or a subset ratio")
        if self.reduction_ratio is not None and not 0 <= self.reduction_ratio < 1:
            raise ValueError(f"the reduction ratio must be a number with 0 <= r < 1, not {self.reduction_ratio!r}")
        if self.subset_ratio is not None and not 0 < self.subset_ratio <= 1:
            raise ValueError(f"the subset ratio must be a number with 0 < r <= 1, not {self.subset_ratio!r}")

    @property
    def share(self) -> float:
        """Of the unpruned cost, what may be spent."""
        return self.subset_ratio if self.reduction_ratio is None else 1 - self.reduction_ratio

    def cost(self, shape: DecoderShape) -> Cost:
        """What is counted."""
        return TOKENS if self.reduction_ratio is None else visual_flops(shape)

    def check(self, cost: Cost, tokens: int, layers: int) -> None:
        """Refuse, before anything runs, what no recipe can meet in a decoder of so many layers.

        Raises
        ------
        ValueError
            Says what is the most, or the least, there is.
        """
        least = least_share(cost, tokens, layers)
        if self.share >= least:
            return
        why = "since the first layer's attention sees all visual tokens, and one of them must stay"
        if self.reduction_ratio is None:
            raise ValueError(
                f"no recipe meets a subset ratio of {self.subset_ratio:g} in a decoder of {layers} layers: the least "
                f"is {least:.4g}, {why}"
            )
        raise ValueError(
            f"no recipe meets a reduction ratio of {self.reduction_ratio:g} in a decoder of {layers} layers: the most "
            f"is {1 - least:.4g}, {why}"
        )

    def check_model(self, model) -> ModelShape:
        """`check` with a model's sizes, which are returned."""
        shape = ModelShape.of(model.config, model.get_vision_tower().config)
        tokens = model.tokens_of_an_image() or shape.visual_tokens
        self.check(self.cost(shape.decoder), tokens, shape.decoder.layers)
        return shape

    def facts(self) -> dict[str, float]:
        """What was asked for, JSON-serialisable."""
        if self.reduction_ratio is None:
            return {"subset_ratio": self.subset_ratio}
        return {"reduction_ratio": self.reduction_ratio}


def fit(statistics: Statistics, budget: Budget, name: str) -> dict[str, Any]:
    """A recipe, as its file holds it.

    Parameters
    ----------
    statistics : Statistics
        Passes over the samples are made as far as they are missing; one process at a time makes them.
    budget : Budget
    name : str
        The model's.

    Returns
    -------
    dict
        JSON-serialisable. "deleted": tokens that leave in each layer, of "tokens"; "kept": tokens that enter each
        layer's attention, and that the last one leaves; "alpha": the share of the attention that a layer may lose, as
        found; "flops": predicted (see `predicted_flops`); "divergence": see `Statistics.divergence`, and the mean of
        all.

    Raises
    ------
    ValueError
        If no recipe meets the budget, or a sample cannot be used.
    """
    model = statistics.model
    shape = budget.check_model(model)
    cost, layers = budget.cost(shape.decoder), shape.decoder.layers
    fixed = model.tokens_of_an_image()
    statistics.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(statistics.folder / ".lock"):
        found = search(statistics.walk, cost, budget.share)
        tokens = round(found.walk.tokens[0] / found.walk.samples)
        deleted = settle(found, cost, budget.share)
        divergence = statistics.divergence(deleted, tokens)
        text = round(statistics.text_tokens())
    kept = kept_by(deleted, tokens)
    losses = divergence["visual"] + divergence["text"]
    return {
        "format": FORMAT,
        "method": "FitPrune",
        "model": {"name": name, "weights": statistics.facts["model"], "layers": layers, "visual_tokens": fixed},
        "data": statistics.facts["data"],
        "budget": budget.facts(),
        "versions": {
            **{package: version(package) for package in ("llava", "torch", "transformers")},
            "python": platform.python_version(),
            "dtype": statistics.facts["dtype"],
            "statistics": statistics.facts["version"],
        },
        "tokens": tokens,
        "deleted": list(deleted),
        "kept": kept,
        "mean_fraction": sum(kept[:-1]) / layers / tokens,
        "alpha": found.alpha,
        "flops": predicted_flops(shape, deleted, tokens, text),
        "divergence": {**divergence, "mean": sum(losses) / len(losses)},
    }


def predicted_flops(shape: ModelShape, deleted: tuple[int, ...], tokens: int, text: int) -> dict[str, Any]:
    """What a recipe costs, with one picture and ``text`` tokens of text.

    Returns
    -------
    dict
        "visual", the published budget: multiply-accumulates of the decoder over visual tokens alone; "prefill": FLOPs,
        two a multiply-accumulate, of the whole prompt, vision tower included. Both "unpruned" and "pruned", with
        "reduction_ratio", the share that is saved.
    """
    kept = kept_by(deleted, tokens)
    walk, cost = Walk.of(kept), visual_flops(shape.decoder)
    crops = max(1, round(tokens / shape.tower.outputs))
    full = tokens_per_layer(text, [tokens] * len(deleted))
    entering, behind = tokens_per_layer(text, kept[:-1]), tokens_per_layer(text, kept[1:])
    costs = {
        "visual": (walk.unpruned(cost), walk.stopped_at(cost)[-1]),
        "prefill": (
            exact_flops(shape, full, crops=crops).total,
            exact_flops(shape, entering, after=behind, crops=crops).total,
        ),
    }
    predicted: dict[str, Any] = {
        name: {"unpruned": whole, "pruned": left, "reduction_ratio": 1 - left / whole}
        for name, (whole, left) in costs.items()
    }
    predicted["prefill"]["text_tokens"] = text
    return predicted


def write_recipe(facts: dict[str, Any], file: Path) -> None:
    """Write a recipe's file, whole or not at all: a list of numbers in one line."""
    atomic_write(file, as_text(facts) + "\n")


def as_text(facts: dict[str, Any]) -> str:
    """JSON with an indent, but lists in one line."""
    lists: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: marked(inner) for key, inner in value.items()}
        if isinstance(value, list):
            lists.append(json.dumps([round(item, 6) if isinstance(item, float) else item for item in value]))
            return f"@{len(lists) - 1}@"
        return value

    text = json.dumps(marked(facts), indent=2)
    for number, line in enumerate(lists):
        text = text.replace(f'"@{number}@"', line)
    return text


def fit_for(model, reduction_ratio: float | None, subset_ratio: float | None, samples: int) -> Recipe:
    """A recipe for a loaded model, fitted on the embedded data and kept in the cache folder; says on stderr which.

    A recipe that ships with the embedded model is taken where it is of this model, data and budget.

    Raises
    ------
    ValueError
        If the model has no tokenizer, or no recipe meets the budget.
    """
    budget = Budget(reduction_ratio, subset_ratio)
    if model.prompt_tokenizer is None:
        raise ValueError(
            "fitprune: a recipe is fitted with the model's prompt_tokenizer, and it has none: load it with "
            "load_pretrained_model, or give FITPRUNE_RECIPE"
        )
    budget.check_model(model)
    source = open_source(MINI, samples)
    questions = Samples(source, model.prompt_tokenizer, model.config)
    statistics = Statistics(model, model.get_vision_tower().image_processor, questions, cache_root())
    recipe = _shipped(statistics, budget)
    if recipe is None:
        (name, value), *_ = budget.facts().items()
        file = statistics.folder / f"{name}-{value:.8g}.json"
        if not file.is_file() and is_main_process():
            print(f"fitprune: fitting a recipe on {samples} pictures, once", file=sys.stderr)
        # What was gathered is kept; the recipe is made of it anew, by the search as it is now.
        write_recipe(fit(statistics, budget, _name(model)), file)
        recipe = read_recipe(str(file))
    if is_main_process():
        print(f"fitprune: {describe(recipe)}; {recipe.name}", file=sys.stderr)
    return recipe


def _name(model) -> str:
    path = getattr(model.config, "name_or_path", "")
    if path == resolve_model_path(EMBEDDED_MODEL):
        return EMBEDDED_MODEL
    return get_model_name_from_path(path) if path else "a model"


def _shipped(statistics: Statistics, budget: Budget) -> Recipe | None:
    for file in sorted(SHIPPED_FOLDER.glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        same_model = facts["model"]["weights"] == statistics.facts["model"]
        if same_model and facts["data"] == statistics.facts["data"] and facts["budget"] == budget.facts():
            return parse_recipe(facts, f"{EMBEDDED_MODEL}/{file.stem}")
    return None
