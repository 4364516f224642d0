"""Fit a recipe: gather statistics, search, settle on whole tokens, predict, and write it all down."""

from __future__ import annotations

import json
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from llava.files import atomic_write
from llava.fitting.data import MINI, find_questions
from llava.fitting.fitprune.search import TOKENS, Cost, Walk, kept_by, least_share, search, settle, visual_flops
from llava.fitting.fitprune.statistics import Statistics, cache_root
from llava.fitting.prompts import Prompts
from llava.flops import ModelShape, exact_flops, tokens_per_layer
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import EMBEDDED_MODEL, resolve_model_path
from llava.model.image_tokens import tokens_of_an_image
from llava.pruning.methods.fitprune.recipe import FORMAT, SHIPPED_FOLDER, Recipe, describe, parse_recipe
from llava.runtime import is_main_process


@dataclass(frozen=True)
class Budget:
    """What a recipe may spend: one of the two, or a ValueError.

    Attributes
    ----------
    reduction_ratio : float or None
        Share that is saved of the decoder's FLOPs over visual tokens, 0 <= ratio < 1.
    subset_ratio : float or None
        Mean over the layers of the fraction of visual tokens present, 0 < ratio <= 1.
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
        if self.subset_ratio is not None:
            return self.subset_ratio
        assert self.reduction_ratio is not None
        return 1 - self.reduction_ratio

    @property
    def name(self) -> str:
        """As a file's name has it: 60 for a reduction ratio of 0.6, kept40 for a subset ratio of 0.4."""
        kept, ratio = ("kept", self.subset_ratio) if self.reduction_ratio is None else ("", self.reduction_ratio)
        assert ratio is not None
        return f"{kept}{100 * ratio:.8g}".replace(".", "_")

    def cost(self, shape: ModelShape) -> Cost:
        """What is counted."""
        return TOKENS if self.reduction_ratio is None else visual_flops(shape.decoder)

    def check(self, shape: ModelShape, tokens: int) -> None:
        """Refuse, before anything runs, what no recipe can meet in a model with images of so many tokens.

        The ValueError states the most, or the least, that can be met.
        """
        layers = shape.decoder.layers
        least = least_share(self.cost(shape), tokens, layers)
        if self.share >= least:
            return
        asked, limit = f"a reduction ratio of {self.reduction_ratio}", f"the most is {1 - least:.4g}"
        if self.reduction_ratio is None:
            asked, limit = f"a subset ratio of {self.subset_ratio}", f"the least is {least:.4g}"
        raise ValueError(
            f"no recipe meets {asked} in a decoder of {layers} layers: {limit}, since the first layer's attention sees "
            "every token and one token stays"
        )

    def metadata(self) -> dict[str, float]:
        """What was asked for, JSON-serialisable."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def fit(statistics: Statistics, budget: Budget, name: str) -> dict[str, Any]:
    """A recipe, as its file holds it, of a model of this ``name``.

    Passes over the samples are made as far as they are missing; one process at a time makes them. A ValueError if no
    recipe meets the budget, or a sample cannot be used.

    Returns
    -------
    dict
        JSON-serialisable. "deleted": tokens that leave in each layer, of "tokens"; "kept": tokens that enter each
        layer's attention, and that the last one leaves; "alpha": the share of the attention that a layer may lose, as
        found; "flops": predicted (see `predicted_flops`); "divergence": see `Statistics.divergence`, and the mean of
        all.
    """
    shape = _checked(statistics.model, budget)
    cost, layers = budget.cost(shape), shape.decoder.layers
    statistics.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(statistics.folder / ".lock"):
        found = search(statistics.walk, cost, budget.share)
        tokens = round(found.walk.tokens[0] / found.walk.samples)
        deleted = settle(found, cost, budget.share)
        divergence = statistics.divergence(deleted, tokens)
        text = round(statistics.text_tokens())
    kept = kept_by(deleted, tokens)
    losses = divergence["visual"] + divergence["text"]
    metadata = statistics.metadata
    fixed = tokens_of_an_image(statistics.model)
    return {
        "format": FORMAT,
        "method": "FitPrune",
        "model": {"name": name, "weights": metadata["model"], "layers": layers, "visual_tokens": fixed},
        "data": metadata["data"],
        "budget": budget.metadata(),
        "versions": {
            **{package: version(package) for package in ("llava", "torch", "transformers")},
            "python": platform.python_version(),
            "dtype": metadata["dtype"],
            "statistics": metadata["version"],
        },
        "tokens": tokens,
        "deleted": list(deleted),
        "kept": kept,
        "mean_fraction": sum(kept[:-1]) / layers / tokens,
        "alpha": found.alpha,
        "flops": predicted_flops(shape, kept, text),
        "divergence": {
            **{kind: [round(lost, 6) for lost in layers] for kind, layers in divergence.items()},
            "mean": sum(losses) / len(losses),
        },
    }


def predicted_flops(shape: ModelShape, kept: list[int], text: int) -> dict[str, Any]:
    """What a recipe costs, with one image and ``text`` tokens of text.

    "visual", the published budget: multiply-accumulates of the decoder over visual tokens alone; "prefill": FLOPs,
    two per multiply-accumulate, of the whole prompt, vision tower included. Both "unpruned" and "pruned", with
    "reduction_ratio", the share that is saved.
    """
    walk, cost = Walk.of(kept), visual_flops(shape.decoder)
    crops = max(1, round(kept[0] * shape.crops / shape.visual_tokens))
    whole, entering, after = (
        tokens_per_layer(text, visual) for visual in ([kept[0]] * walk.layers, kept[:-1], kept[1:])
    )
    costs = {
        "visual": (walk.unpruned(cost), walk.stopped_at(cost)[-1]),
        "prefill": (
            exact_flops(shape, whole, crops=crops).total,
            exact_flops(shape, entering, after=after, crops=crops).total,
        ),
    }
    predicted: dict[str, Any] = {
        name: {"unpruned": whole, "pruned": left, "reduction_ratio": 1 - left / whole}
        for name, (whole, left) in costs.items()
    }
    predicted["prefill"]["text_tokens"] = text
    return predicted


def write_recipe(metadata: dict[str, Any], file: Path) -> Recipe:
    """Write a recipe's file, whole or not at all, each list of numbers in one line; returns the recipe."""
    text = re.sub(r"\[\s([^]]*)\]", lambda found: f"[{' '.join(found[1].split())}]", json.dumps(metadata, indent=2))
    atomic_write(file, text + "\n")
    return parse_recipe(json.loads(text), str(file))


def fit_for(model, reduction_ratio: float | None, subset_ratio: float | None, samples: int) -> Recipe:
    """A recipe for a loaded model, fitted on the embedded data and kept in the cache folder; prints which to stderr.

    A recipe that ships with the embedded model is taken where it is of this model, data and budget. A ValueError if the
    model has no tokenizer, or no recipe meets the budget.
    """
    budget = Budget(reduction_ratio, subset_ratio)
    if model.prompt_tokenizer is None:
        raise ValueError(
            "fitprune: a recipe is fitted with the model's prompt_tokenizer, and it has none: load it with "
            "load_pretrained_model, or give FITPRUNE_RECIPE"
        )
    _checked(model, budget)
    prompts = Prompts(find_questions(MINI, samples), model.prompt_tokenizer, model.config)
    statistics = Statistics(model, model.get_vision_tower().image_processor, prompts, cache_root())
    recipe = _shipped(statistics, budget)
    if recipe is None:
        file = statistics.folder / f"{budget.name}.json"
        if not file.is_file() and is_main_process():
            print(f"fitprune: fitting a recipe on {samples} images, once", file=sys.stderr)
        # What was gathered is kept; the recipe is made of it anew, by the search as it is now.
        recipe = write_recipe(fit(statistics, budget, _name(model)), file)
    if is_main_process():
        print(f"fitprune: {describe(recipe)}; {recipe.name}", file=sys.stderr)
    return recipe


def _checked(model, budget: Budget) -> ModelShape:
    shape = ModelShape.of(model.config, model.get_vision_tower().config)
    budget.check(shape, tokens_of_an_image(model) or shape.visual_tokens)
    return shape


def _name(model) -> str:
    path = getattr(model.config, "name_or_path", "")
    if path == resolve_model_path(EMBEDDED_MODEL):
        return EMBEDDED_MODEL
    return get_model_name_from_path(path) if path else "a model"


def _shipped(statistics: Statistics, budget: Budget) -> Recipe | None:
    for file in sorted(SHIPPED_FOLDER.glob("*.json")):
        metadata = json.loads(file.read_text(encoding="utf-8"))
        found = metadata["model"]["weights"], metadata["data"], metadata["budget"]
        if found == (statistics.metadata["model"], statistics.metadata["data"], budget.metadata()):
            return parse_recipe(metadata, f"{EMBEDDED_MODEL}/{file.stem}")
    return None
