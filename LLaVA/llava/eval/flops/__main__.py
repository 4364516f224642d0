"""What a prefill costs, unpruned and pruned, in the literature's convention and exactly."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from llava.command import Parser, positive, read_methods, whole
from llava.files import check_writable, write_json
from llava.flops import (
    BENCHMARK_TOKENS,
    SHAPES,
    UNITS,
    USUAL_TEXT,
    ModelShape,
    exact_flops,
    literature_flops,
    load_shape,
    tokens_per_layer,
    visual_per_layer,
)
from llava.flops.made_up import PUBLISHED
from llava.pruning import PruningConfig

Costs = dict[str, dict[str, float]]
"""Part -> "unpruned", and with a method "pruned" and "ratio"."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(
        "llava.eval.flops",
        __doc__,
        epilog="Selecting the tokens, and what a method makes the model compute for it, is not counted.",
    )
    family = "a family of transformers' models as it is configured by default, such as qwen2_5_vl"
    named = ", ".join((*SHAPES, *PUBLISHED, family))
    parser.add_model("1.5-7b", also=f"{named}, or what only the configuration is read of: ")
    prompt = parser.add_argument_group("the prompt")
    prompt.add_argument("--text", type=whole, metavar="N", help=f"text tokens, all of them (default: {USUAL_TEXT})")
    prompt.add_argument("--visual", type=positive, metavar="N", help="visual tokens (default: by model, mostly 576)")
    prompt.add_argument("--crops", type=positive, metavar="N", help="crops of the image (default: by model, 1 or 5)")
    averages = "instead: the papers' averages over the token counts of eleven benchmarks (literature's convention)"
    prompt.add_argument("--benchmarks", action="store_true", help=averages)
    parser.add_method(None, "one of the ")
    parser.add_ratio(None)
    parser.add_argument("--layer", metavar="L", help="as --method NAME:layer=L")
    as_method = "as --method NAME:OPTION=VALUE; may be repeated"
    parser.add_argument("--option", action="append", default=[], metavar="OPTION=VALUE", help=as_method)
    parser.add_argument("--convention", choices=("both", *UNITS), help="default: both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it all to a file, too")
    return parser.run(_count, argv)


def _count(arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        check_writable(arguments.json)
    config = _pruning(arguments)
    shape = load_shape(arguments.model, arguments.visual, arguments.crops)
    report, text = (_benchmarks if arguments.benchmarks else _prompt)(arguments, shape, config)
    if arguments.json is not None:
        write_json(arguments.json, {"model": arguments.model, "pruning": config and config.to_dict()} | report)
    sizes = f"{shape.decoder.layers} decoder layers of {shape.decoder.hidden}"
    print(f"{arguments.model}: {sizes}, feed-forward {shape.decoder.intermediate}")
    print("unpruned" if config is None else config.describe(), text, sep="\n\n")


def _pruning(arguments: argparse.Namespace) -> PruningConfig | None:
    """The method, by the rules of the switch; the environment is ignored."""
    settings = [*arguments.option, *([] if arguments.layer is None else [f"layer={arguments.layer}"])]
    if arguments.method is None:
        if arguments.ratio is not None or settings:
            raise ValueError("--ratio, --layer and --option need a --method")
        return None
    found = read_methods(":".join([arguments.method, *settings]), arguments.ratio, {})
    if len(found) > 1:
        raise ValueError(f"--method takes one method here, not {arguments.method}")
    return next(iter(found.values()))


def _counts(config: PruningConfig | None, text: int, visual: int, layers: int) -> dict[str, tuple[list[int], ...]]:
    """Of each variant the tokens that enter every layer, and those after its attention."""
    counts = {"unpruned": ([visual] * layers,) * 2}
    if config is not None:
        counts["pruned"] = visual_per_layer(config, visual, layers)
    return {name: tuple(tokens_per_layer(text, tokens) for tokens in pair) for name, pair in counts.items()}


def _prompt(
    arguments: argparse.Namespace, shape: ModelShape, config: PruningConfig | None
) -> tuple[dict[str, Any], str]:
    """What one prompt costs: for the JSON file, and for a person."""
    text = USUAL_TEXT if arguments.text is None else arguments.text
    visual, crops = shape.visual_tokens, shape.crops
    counts = _counts(config, text, visual, shape.decoder.layers)
    tokens = {name: entering for name, (entering, _) in counts.items()}
    means = {name: mean(entering) - text for name, entering in tokens.items()}
    costs = {}
    if arguments.convention != "exact":
        decoder = {name: {"decoder": literature_flops(shape.decoder, n, after=m)} for name, (n, m) in counts.items()}
        costs["literature"] = _costs(decoder)
    if arguments.convention != "literature":
        exact = {name: exact_flops(shape, n, after=m, crops=crops).to_dict() for name, (n, m) in counts.items()}
        costs["exact"] = _costs(exact)

    lines = [f"tokens per layer: {text} text and {visual} visual tokens"]
    lines[0] += "" if shape.reads_whole else f", {crops} crop{'s' * (crops > 1)}"
    lines += [f"  {name:14}{_ranges(n)}" for name, n in tokens.items()]
    if config is not None:
        share = 100 * means["pruned"] / visual
        lines.append(f"  {'visual, mean':14}{means['pruned']:.6g} of {visual} ({share:.2f} %)")
    for convention, cost in costs.items():
        lines += ["", *_table(convention, cost)]
    report = {"text": text, "visual": visual, "crops": crops, "tokens_per_layer": tokens, "mean_visual_tokens": means}
    return report | costs, "\n".join(lines)


def _benchmarks(
    arguments: argparse.Namespace, shape: ModelShape, config: PruningConfig | None
) -> tuple[dict[str, Any], str]:
    """The papers' averages: for the JSON file, and for a person."""
    for name in ("text", "visual", "crops"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--benchmarks has token counts of its own: leave out --{name}")
    if arguments.convention in ("both", "exact"):
        raise ValueError(f"--benchmarks is in the literature's convention, not {arguments.convention}")
    costs: Costs = {}
    for benchmark, (text, several_crops) in BENCHMARK_TOKENS.items():
        visual = several_crops if shape.crops > 1 else shape.visual_tokens
        counts = _counts(config, text, visual, shape.decoder.layers)
        costs |= _costs(
            {name: {benchmark: literature_flops(shape.decoder, n, after=m)} for name, (n, m) in counts.items()}
        )
    # As in the papers the ratio's average is that of the ratios, not the ratio of the averages.
    costs["average"] = {column: mean(cost[column] for cost in costs.values()) for column in costs["COCO"]}
    return {"literature": costs}, "\n".join(_table("literature", costs))


def _costs(flops: Mapping[str, Mapping[str, int]]) -> Costs:
    """ "unpruned" and perhaps "pruned", each by part -> both and their ratio, by part."""
    costs: Costs = {part: {"unpruned": full} for part, full in flops["unpruned"].items()}
    for part, left in flops.get("pruned", {}).items():
        full = costs[part]["unpruned"]
        costs[part] |= {"pruned": left, "ratio": left / full if full else 1.0}
    return costs


def _table(convention: str, costs: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines with a row per part, and columns for what each has."""
    largest = max(cost["unpruned"] for cost in costs.values())
    scale, prefix = next((unit for unit in ((1e12, "T"), (1e9, "G")) if largest >= unit[0]), (1e6, "M"))
    columns = list(next(iter(costs.values())))
    lines = [f"{f'{convention}, {prefix}{UNITS[convention]}':18}" + "".join(f"{column:>12}" for column in columns)]
    for part, cost in costs.items():
        cells = [
            f"{100 * cost[column]:10.2f} %" if column == "ratio" else f"{cost[column] / scale:12.4f}"
            for column in columns
        ]
        lines.append(f"  {part.replace('_', ' '):16}" + "".join(cells))
    return lines


def _ranges(tokens: Sequence[int]) -> str:
    """Layers with the same number of tokens together: "0-1: 636, 2-31: 116"."""
    parts, first = [], 0
    for count, run in groupby(tokens):
        last = first + len(list(run)) - 1
        parts.append(f"{first}: {count}" if first == last else f"{first}-{last}: {count}")
        first = last + 1
    return ", ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
