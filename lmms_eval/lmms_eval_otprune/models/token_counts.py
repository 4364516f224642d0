"""Counts visual tokens per decoder layer, and prefill FLOPs relative to unpruned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.flops import ModelShape

CONVENTIONS = ("literature", "exact")


@dataclass(frozen=True)
class ImageCount:
    """The visual tokens of one image in each decoder layer.

    Attributes
    ----------
    total : int
        Tokens in an unpruned model.
    runs : tuple of (layers, tokens)
        Run-length encoded tokens per layer, from the first layer on.
    crops : int
        Images that the vision tower encodes, as `llava.flops.ModelShape` counts them.
    after : tuple of (layers, tokens), or None
        The tokens in the rest of each layer, for a method that drops tokens after the attention; None if the same.
    """

    total: int
    runs: tuple[tuple[int, int], ...]
    crops: int = 1
    after: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(
        cls, total: int, per_layer: Sequence[int], crops: int = 1, after_attention: Sequence[int] | None = None
    ) -> ImageCount:
        """From the number of tokens in each decoder layer, and after its attention if that differs."""
        runs = _runs(per_layer)
        after = runs if after_attention is None else _runs(after_attention)
        return cls(total, runs, crops, None if after == runs else after)

    @property
    def per_layer(self) -> list[int]:
        """Tokens in each decoder layer."""
        return _unrolled(self.runs)

    @property
    def after_attention(self) -> list[int]:
        """Tokens in each layer's output projection and feed-forward block."""
        return _unrolled(self.runs if self.after is None else self.after)

    @property
    def entering(self) -> int:
        """Tokens in the first decoder layer."""
        return self.runs[0][1]

    @property
    def kept(self) -> float:
        """Mean over the decoder layers of the tokens present."""
        return sum(layers * tokens for layers, tokens in self.runs) / sum(layers for layers, _ in self.runs)


def _runs(per_layer: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((len(list(run)), tokens) for tokens, run in groupby(per_layer))


def _unrolled(runs: Sequence[tuple[int, int]]) -> list[int]:
    return [tokens for layers, tokens in runs for _ in range(layers)]


@dataclass(frozen=True)
class PromptCount:
    """One prompt as the decoder sees it.

    Attributes
    ----------
    text : int
        Text tokens, which are present in all layers.
    images : tuple of ImageCount
    """

    text: int
    images: tuple[ImageCount, ...]


def summary(prompts: Mapping[PromptCount, int], shape: ModelShape | None = None) -> dict[str, Any] | None:
    """Summarise how many tokens were kept and what the prefills cost.

    Parameters
    ----------
    prompts : mapping
        Prompt -> how often it occurred. Those without images are not counted.
    shape : ModelShape, optional
        None: costs are left out.

    Returns
    -------
    dict, or None without images
        "images": how many; "total" and "kept": "min", "mean" and "max" over them, an image's kept tokens being the mean
        over the decoder layers of those present; "per_layer": mean tokens in each decoder layer. "flops": the prefills'
        sums, "pruned" and "unpruned", by convention (see `llava.flops`), and "flops_ratio", their quotients; both
        None without a shape. JSON-serialisable.
    """
    images: Counter[ImageCount] = Counter()
    for prompt, times in prompts.items():
        for image in prompt.images:
            images[image] += times
    number = images.total()
    if not number:
        return None
    # Sums of whole numbers do not depend on how the prompts were divided among processes.
    layers = [[tokens * times for tokens in image.per_layer] for image, times in images.items()]
    sums = [sum(column) for column in zip(*layers, strict=True)]
    kept = [image.kept for image in images]
    totals = [image.total for image in images]
    total = sum(image.total * times for image, times in images.items())
    flops = None if shape is None else _flops(prompts, shape)
    return {
        "images": number,
        "total": {"min": min(totals), "mean": total / number, "max": max(totals)},
        "kept": {"min": min(kept), "mean": sum(sums) / len(sums) / number, "max": max(kept)},
        "per_layer": [tokens / number for tokens in sums],
        "flops": flops,
        "flops_ratio": _ratios(flops),
    }


def merged_summary(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Merge `summary` dictionaries of one model; what any of them lacks, as older results do, is None."""
    images = sum(part["images"] for part in summaries)
    if not images:
        return None
    flops = None
    if all(part.get("flops") for part in summaries):
        flops = {
            convention: {
                kind: sum(part["flops"][convention][kind] for part in summaries) for kind in ("pruned", "unpruned")
            }
            for convention in CONVENTIONS
        }
    per_layer = None
    if all(part.get("per_layer") for part in summaries):
        columns = zip(*([tokens * part["images"] for tokens in part["per_layer"]] for part in summaries), strict=True)
        per_layer = [sum(column) / images for column in columns]
    merged = {
        name: {
            "min": min(part[name]["min"] for part in summaries),
            "mean": sum(part[name]["mean"] * part["images"] for part in summaries) / images,
            "max": max(part[name]["max"] for part in summaries),
        }
        for name in ("total", "kept")
    }
    return {"images": images, **merged, "per_layer": per_layer, "flops": flops, "flops_ratio": _ratios(flops)}


def describe(counts: Mapping[str, Any]) -> str:
    """A `summary` in one line of text."""
    text = f"{counts['kept']['mean']:.4g} of {counts['total']['mean']:.4g} visual tokens an image"
    per_layer = counts.get("per_layer") or ()
    if len(runs := layer_runs(per_layer)) > 1:
        shown = ", ".join(f"{tokens:.4g} x{layers}" for _, layers, tokens in runs)
        text += f" (mean over the decoder layers: {shown})"
    if ratio := counts.get("flops_ratio"):
        text += (
            f", prefill FLOPs {100 * ratio['exact']:.1f} % of unpruned "
            f"({100 * ratio['literature']:.1f} % as papers count)"
        )
    return text


def layer_runs(per_layer: Sequence[float]) -> list[tuple[int, int, float]]:
    """(first layer, layers, tokens) of each run of layers with the same number of tokens."""
    runs, first = [], 0
    for tokens, run in groupby(per_layer):
        runs.append((first, len(list(run)), tokens))
        first += runs[-1][1]
    return runs


def _flops(prompts: Mapping[PromptCount, int], shape: ModelShape) -> dict[str, dict[str, int]]:
    from llava.flops import exact_flops, literature_flops, tokens_per_layer

    flops = {convention: {"pruned": 0, "unpruned": 0} for convention in CONVENTIONS}
    for prompt, times in prompts.items():
        if not prompt.images:
            continue
        present = _sums(image.per_layer for image in prompt.images)
        left = _sums(image.after_attention for image in prompt.images)
        total = [sum(image.total for image in prompt.images)] * len(present)
        crops = [image.crops for image in prompt.images]
        for kind, visual in (("pruned", (present, left)), ("unpruned", (total, total))):
            tokens, after = (tokens_per_layer(prompt.text, column) for column in visual)
            flops["literature"][kind] += times * literature_flops(shape.decoder, tokens, after=after)
            flops["exact"][kind] += times * exact_flops(shape, tokens, after=after, crops=crops).total
    return flops


def _sums(per_layer: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*per_layer, strict=True)]


def _ratios(flops: Mapping[str, Mapping[str, int]] | None) -> dict[str, float] | None:
    return None if flops is None else {name: cost["pruned"] / cost["unpruned"] for name, cost in flops.items()}
