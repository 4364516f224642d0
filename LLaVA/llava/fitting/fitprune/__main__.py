"""The command line: ``python -m llava.fitting.fitprune fit ...``, ``plot ...`` and ``equal ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.files import atomic_write, check_writable
from llava.fitting.fitprune.sources import MINI
from llava.pruning.methods.fitprune.recipe import SHIPPED_MODEL, describe, known_recipes, read_recipe
from llava.runtime import print_everything

SAMPLES = 655
"""A thousandth of LLaVA's instruction data, as published."""


def main(argv: Sequence[str] | None = None) -> int:
    """Fit or draw; exits with 2 and one sentence when what was asked for cannot be."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        {"fit": _fit, "plot": _plot, "equal": _equal}[arguments.command](arguments)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _fit(arguments: argparse.Namespace) -> None:
    from llava.fitting.fitprune.fit import Budget, fit, write_recipe
    from llava.fitting.fitprune.samples import Samples
    from llava.fitting.fitprune.sources import open_source
    from llava.fitting.fitprune.statistics import Statistics, cache_root
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.pruning import PruningConfig

    if PruningConfig.from_env() is not None:
        raise ValueError("a recipe is fitted to the unpruned model: unset BASELINE")
    budgets = [Budget(reduction_ratio=ratio) for ratio in arguments.reduction_ratio or ()]
    budgets += [Budget(subset_ratio=ratio) for ratio in arguments.subset_ratio or ()]
    if not budgets:
        raise ValueError("say what may be spent: --reduction-ratio or --subset-ratio")
    files = _files(arguments.output, budgets)
    for file in files:
        check_writable(file)
    # What is wrong with the data is found before any weight is loaded.
    source = open_source(arguments.data, arguments.samples, arguments.seed, arguments.image_folder)
    if source.count < arguments.samples:
        print(f"{arguments.data} has {source.count} samples, not {arguments.samples}: all are taken", file=sys.stderr)

    device = arguments.device or _device()
    dtype = arguments.dtype or ("float32" if device == "cpu" else "float16")
    name = get_model_name_from_path(arguments.model)
    tokenizer, model, processor, _ = load_pretrained_model(
        arguments.model, arguments.model_base, name, device=device, dtype=dtype, multimodal=True
    )
    samples = Samples(source, tokenizer, model.config, arguments.conv_mode)
    statistics = Statistics(model, processor, samples, arguments.statistics or cache_root())
    for budget, file in zip(budgets, files, strict=True):
        write_recipe(fit(statistics, budget, name), file)
        print(f"{file}: {describe(read_recipe(str(file)))}")
    print(f"statistics: {statistics.folder}")


def _files(output: Path, budgets: Sequence) -> list[Path]:
    """Where the recipes go: the file that is named, or one by per cent in a folder."""
    if output.suffix == ".json":
        if len(budgets) > 1:
            raise ValueError(f"--output {output}: {len(budgets)} recipes need a folder")
        return [output]
    names = [
        f"{100 * budget.reduction_ratio:g}" if budget.subset_ratio is None else f"kept{100 * budget.subset_ratio:g}"
        for budget in budgets
    ]
    return [output / f"{name.replace('.', '_')}.json" for name in names]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _plot(arguments: argparse.Namespace) -> None:
    from llava.fitting.fitprune.plot import by_budget, draw, write_csv

    recipes = by_budget([read_recipe(name) for name in arguments.recipes])
    picture = arguments.output.with_suffix(".png")
    atomic_write(picture, lambda part: draw(recipes).savefig(part, format="png", dpi=130))
    write_csv(picture.with_suffix(".csv"), recipes)
    print(f"written: {picture}, {picture.with_suffix('.csv')}")


def _equal(arguments: argparse.Namespace) -> None:
    from llava.eval.flops import USUAL_TEXT, load_shape
    from llava.fitting.fitprune.equal import Prefill, equal_ratio

    recipe = read_recipe(arguments.recipe)
    text = arguments.text
    if text is None:
        text = recipe.facts.get("flops", {}).get("prefill", {}).get("text_tokens", USUAL_TEXT)
    prefill = Prefill.of(recipe, load_shape(arguments.model), text)
    whole = prefill.unpruned()
    print(
        f"{recipe.name}: {prefill.with_recipe(recipe) / whole:.2%} of the unpruned prefill's FLOPs, {text} text tokens"
    )
    texts = [f"fitprune:recipe={recipe.name}"]
    for method in arguments.method.split(","):
        ratio = equal_ratio(prefill, recipe, method)
        print(f"{method} at {ratio:.4g}: {prefill.with_method(method, ratio) / whole:.2%}")
        texts.append(f"{method}:ratio={ratio:.4g}")
    suite = "mini" if arguments.model == SHIPPED_MODEL else "paper"
    print(f"side by side: bash run_OTPrune.sh {suite} --method {','.join(texts)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.fitting.fitprune",
        description="FitPrune: how many visual tokens leave in each decoder layer, fitted to a model and a budget.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser(
        "fit",
        help="make recipes",
        description="Make a recipe for any checkpoint. Interrupted, the same command goes on where it was; for another "
        "budget, what was gathered is used again.",
    )
    fit.add_argument("--model", default="llava-mini", help="checkpoint folder, hub id or llava-mini (the default)")
    fit.add_argument("--model-base", help="language model that a LoRA or projector-only checkpoint is put on")
    fit.add_argument(
        "--data",
        default=MINI,
        help="mini (default): pictures and questions of the embedded world; a benchmark task or group of lmms-eval, as "
        "gqa or otprune_mini, the embedded suite; or a JSON file in LLaVA's format",
    )
    fit.add_argument("--image-folder", type=Path, metavar="DIR", help="of a JSON file's pictures (default: its own)")
    fit.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help=f"default: {SAMPLES}, as published")
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of samples (default: 0)")
    share = "share of the decoder's FLOPs over visual tokens to save, 0 <= r < 1"
    fit.add_argument("--reduction-ratio", type=float, nargs="+", metavar="R", help=f"{share}; one recipe each")
    mean = "instead: mean over the layers of the fraction of visual tokens present (SUBSET_RATIO), 0 < r <= 1"
    fit.add_argument("--subset-ratio", type=float, nargs="+", metavar="R", help=mean)
    fit.add_argument("--conv-mode", help="prompt template (default: the checkpoint's)")
    fit.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    fit.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on a GPU")
    cache = "folder for what is gathered (default: in the user's cache folder)"
    fit.add_argument("--statistics", type=Path, metavar="DIR", help=cache)
    output = "FILE.json, or for several recipes a folder (default: recipe.json)"
    fit.add_argument("--output", type=Path, default=Path("recipe.json"), metavar="FILE", help=output)

    drawn = "draw recipes: tokens by layer, divergence against budget"
    plot = commands.add_parser("plot", help=drawn, description=f"{drawn.capitalize()}.")
    plot.add_argument("recipes", nargs="+", metavar="RECIPE", help=f"files, or {', '.join(known_recipes()[:2])}, ...")
    written = "PNG, and a CSV beside it (default: recipe.png)"
    plot.add_argument("--output", type=Path, default=Path("recipe.png"), metavar="FILE", help=written)

    same = "at which ratios other methods cost as much as a recipe"
    equal = commands.add_parser("equal", help=same, description=f"Tell {same}, by the prefill's exact FLOPs.")
    equal.add_argument("recipe", metavar="RECIPE", help="a file, or a known name")
    models = "1.5-7b and the like, llava-mini (the default), or a checkpoint of which only the configuration is read"
    equal.add_argument("--model", default=SHIPPED_MODEL, help=models)
    equal.add_argument("--method", default="fastv,random", metavar="NAME[,NAME]", help="default: fastv,random")
    equal.add_argument("--text", type=int, metavar="N", help="text tokens of a prompt (default: as the recipe says)")
    return parser


if __name__ == "__main__":
    print_everything()
    sys.exit(main())
