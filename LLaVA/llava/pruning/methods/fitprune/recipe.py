"""Recipes: how many visual tokens leave in each decoder layer, as a small JSON file that states where it comes from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from llava.pruning.schedule import Schedule, mean_fraction

FORMAT = 1
PUBLISHED_FILE = Path(__file__).with_name("published.json")
SHIPPED_FOLDER = Path(__file__).parents[3] / "mini" / "recipes"
PUBLISHED_MODEL, SHIPPED_MODEL = "llava-1.5-7b", "llava-mini"
VALUES_OF_A_WEIGHT = 64


@dataclass(frozen=True)
class Recipe:
    """How many visual tokens of an image leave in each decoder layer, after its attention.

    Attributes
    ----------
    name : str
        What errors call it: a file, or a known name.
    deleted : tuple of int
        One number a layer; a ValueError if there are none, or they leave no token.
    tokens : int
        Visual tokens of an image before any leaves, which the numbers are of.
    fixed : bool
        Whether every image of the model has so many. Else images differ, and the numbers are shares of ``tokens``.
    metadata : mapping
        The whole file: model, data, budget, versions, what was predicted.
    """

    name: str
    deleted: tuple[int, ...]
    tokens: int
    fixed: bool
    metadata: Mapping[str, Any]

    def __post_init__(self):
        whole = isinstance(self.deleted, tuple) and all(type(n) is int and n >= 0 for n in self.deleted)
        if not whole or not self.deleted:
            raise ValueError(f"{self.name}: deleted must list a whole number >= 0 for each layer, not {self.deleted!r}")
        if type(self.tokens) is not int or sum(self.deleted) >= self.tokens:
            raise ValueError(
                f"{self.name}: {sum(self.deleted)} of {self.tokens!r} visual tokens leave, but at least one must stay"
            )

    @property
    def layers(self) -> int:
        """Decoder layers of the model that it is for."""
        return len(self.deleted)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Tokens that enter each layer's attention, and those that the last one leaves: one number more than layers."""
        return tuple(accumulate(self.deleted, lambda left, gone: left - gone, initial=self.tokens))

    @property
    def mean_fraction(self) -> float:
        """Mean over the layers of the fraction of visual tokens present."""
        return sum(self.kept[:-1]) / self.layers / self.tokens

    @cached_property
    def schedule(self) -> Schedule:
        """As `Pruner.schedule_for` returns it; one that drops nothing where the recipe does not."""
        schedule = tuple(
            (layer + 1, self.kept[layer + 1] / self.tokens) for layer, gone in enumerate(self.deleted) if gone
        )
        return schedule or ((self.layers, 1.0),)

    def check_layers(self, layers: int) -> None:
        """Refuse a decoder of another depth with a `ValueError`."""
        if layers != self.layers:
            raise ValueError(
                f"the recipe {self.name} is for {self._model}, whose decoder has {self.layers} layers; this one has "
                f"{layers}"
            )

    def check_tokens(self, n: int | None) -> None:
        """Refuse a model with other images, ``n`` visual tokens each (None: it depends), with a `ValueError`."""
        if self.fixed and n != self.tokens:
            found = "of this model their number depends on the image" if n is None else f"here it has {n}"
            raise ValueError(
                f"the recipe {self.name} is for {self._model}, where an image has {self.tokens} visual tokens; {found}"
            )

    def of_other_weights(self, model: torch.nn.Module) -> bool:
        """Whether it was fitted to another model's weights than these; False where that cannot be known."""
        made_with, dtype = self.metadata.get("model", {}).get("weights"), self.metadata.get("versions", {}).get("dtype")
        # In another dtype the same weights have other values.
        if made_with is None or dtype != str(model.dtype).removeprefix("torch."):
            return False
        return made_with != model_fingerprint(model)

    @property
    def _model(self) -> str:
        return str(self.metadata.get("model", {}).get("name", "another model"))


def describe(recipe: Recipe) -> str:
    """One line for a person: how a reduction ratio and a SUBSET_RATIO go together in this recipe."""
    saved = recipe.metadata.get("flops", {}).get("visual", {}).get("reduction_ratio")
    lost = recipe.metadata.get("divergence", {}).get("mean")
    return (
        ("" if saved is None else f"reduction ratio {saved:.4g} = ")
        + f"SUBSET_RATIO {recipe.mean_fraction:.4g}, the mean over the {recipe.layers} layers of the fraction present; "
        + f"visual tokens by layer: {' '.join(map(str, recipe.kept[:-1]))}"
        + ("" if lost is None else f"; divergence {lost:.4g}")
    )


def model_fingerprint(model: torch.nn.Module) -> str:
    """Twelve hexadecimal digits of names, shapes and a few values of all weights, as they are in the model's dtype."""
    digest = hashlib.sha256()
    # Recipes on disk were made when the tower's weights had no such level in their names.
    weights = {name.replace(".vision_model.", "."): weight for name, weight in model.state_dict().items()}
    for name, weight in sorted(weights.items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.numel() and not weight.is_meta:
            step = max(1, weight.numel() // VALUES_OF_A_WEIGHT)
            values = weight.detach().flatten()[::step][:VALUES_OF_A_WEIGHT]
            digest.update(values.to(device="cpu", dtype=torch.float32).numpy().tobytes())
    return digest.hexdigest()[:12]


def known_recipes() -> list[str]:
    """Names that `read_recipe` takes beside files: the published ones, and those that ship for the embedded model."""
    published = [f"{PUBLISHED_MODEL}/{percent}" for percent in _published()["deleted"]]
    return published + sorted(f"{SHIPPED_MODEL}/{file.stem}" for file in SHIPPED_FOLDER.glob("*.json"))


def read_recipe(name: str) -> Recipe:
    """A recipe by its file, or by a known name such as "llava-1.5-7b/60" (per cent of the FLOPs saved).

    A ValueError if there is none, or the file is no recipe.
    """
    file = Path(name).expanduser()
    if not file.is_file():
        model, _, percent = name.partition("/")
        if model == PUBLISHED_MODEL and percent in _published()["deleted"]:
            return _published_recipe(name, percent)
        file = SHIPPED_FOLDER / f"{percent}.json"
        if model != SHIPPED_MODEL or not re.fullmatch(r"\w+", percent) or not file.is_file():
            raise ValueError(f"there is no recipe {name!r}: give a file, or one of {', '.join(known_recipes())}")
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the recipe {name} cannot be read: {error}") from None
    return parse_recipe(metadata, name)


def parse_recipe(metadata: Any, name: str) -> Recipe:
    """A recipe from the content of its file; a ValueError names what is missing or wrong."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else type(metadata).__name__
        raise ValueError(f"{name} is no recipe: it must be a JSON object with format {FORMAT}, not {found!r}")
    model: Any = metadata.get("model")
    for part, keys in ((metadata, ("deleted", "tokens")), (model, ("layers", "visual_tokens"))):
        missing = [key for key in keys if not isinstance(part, dict) or key not in part]
        if missing:
            raise ValueError(f"the recipe {name} does not state {', '.join(missing)}")
    deleted = metadata["deleted"]
    recipe = Recipe(
        name=name,
        deleted=tuple(deleted) if isinstance(deleted, list) else deleted,
        tokens=metadata["tokens"],
        fixed=model["visual_tokens"] is not None,
        metadata=metadata,
    )
    if recipe.layers != model["layers"]:
        raise ValueError(f"the recipe {name} has {recipe.layers} numbers for {model['layers']!r} layers")
    return recipe


def recipe_digest(recipe: Recipe) -> str:
    """Twelve hexadecimal digits of what decides over tokens: not of names, dates and predictions."""
    content = json.dumps([recipe.deleted, recipe.tokens, recipe.fixed])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def scalable(recipe: Recipe) -> Schedule:
    """The drops that scaling can change, before the last layer's attention; a ValueError if there are none."""
    schedule = tuple((layer, fraction) for layer, fraction in recipe.schedule if layer < recipe.layers)
    if not schedule or mean_fraction(schedule, recipe.layers) == 1:
        raise ValueError(f"the recipe {recipe.name} drops nothing before the last layer, so it cannot be scaled")
    return schedule


def _published() -> dict[str, Any]:
    return json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))


def _published_recipe(name: str, percent: str) -> Recipe:
    table = _published()
    metadata = {"model": {"name": "LLaVA-1.5-7B"}, "source": table["source"]}
    return Recipe(name, tuple(table["deleted"][percent]), table["tokens"], fixed=True, metadata=metadata)
