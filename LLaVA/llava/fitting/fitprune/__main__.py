"""FitPrune: how many visual tokens leave in each decoder layer, fitted to a model and a budget."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command import Parser
from llava.files import check_writable
from llava.fitting.options import add_samples, load, samples_of, steps_of
from llava.pruning.methods.fitprune.recipe import describe


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return _parser().run(lambda arguments: arguments.action(arguments), argv)


def _fit(arguments: argparse.Namespace) -> None:
    from llava.fitting.fitprune.fit import Budget, fit, write_recipe
    from llava.fitting.fitprune.statistics import Statistics, cache_root
    from llava.fitting.prompts import Prompts

    budgets = [Budget(reduction_ratio=ratio) for ratio in arguments.reduction_ratio or ()]
    budgets += [Budget(subset_ratio=ratio) for ratio in arguments.subset_ratio or ()]
    if not budgets:
        raise ValueError("give what may be spent: --reduction-ratio or --subset-ratio")
    output = arguments.output
    if output.suffix == ".json" and len(budgets) > 1:
        raise ValueError(f"--output {output}: {len(budgets)} recipes need a folder")
    files = [output if output.suffix == ".json" else output / f"{budget.name}.json" for budget in budgets]
    for file in files:
        check_writable(file)
    # What is wrong with the data is found before any weight is loaded.
    source = samples_of(arguments)
    if len(source) < arguments.samples:
        print(f"{arguments.data} has {len(source)} samples, not {arguments.samples}: all are taken", file=sys.stderr)
    tokenizer, model, processor, name = load(arguments)
    prompts = Prompts(source, tokenizer, model.config, arguments.conv_mode)
    statistics = Statistics(model, processor, prompts, arguments.statistics or cache_root())
    for budget, file in zip(budgets, files, strict=True):
        print(f"{file}: {describe(write_recipe(fit(statistics, budget, name), file))}")
    print(f"statistics: {statistics.folder}")


def _parser() -> Parser:
    parser = Parser("llava.fitting.fitprune", __doc__)
    step = steps_of(parser, "fit")

    fit = step(_fit, "fit", "make recipes for a checkpoint; interrupted, the same command continues where it was")
    add_samples(fit, samples=655, seed=0)  # a thousandth of LLaVA's instruction data, as published
    share = "share of the decoder's FLOPs over visual tokens to save, 0 <= r < 1; one recipe each"
    fit.add_argument("--reduction-ratio", type=float, nargs="+", metavar="R", help=share)
    mean = "instead: mean over the layers of the fraction of visual tokens present (SUBSET_RATIO), 0 < r <= 1"
    fit.add_argument("--subset-ratio", type=float, nargs="+", metavar="R", help=mean)
    fit.add_argument("--conv-mode", help="prompt template (default: the checkpoint's)")
    fit.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on a GPU")
    cache = "folder for what is gathered (default: in the user's cache folder)"
    fit.add_argument("--statistics", type=Path, metavar="DIR", help=cache)
    output = "FILE.json, or for several recipes a folder (default: recipe.json)"
    fit.add_argument("--output", type=Path, default=Path("recipe.json"), metavar="FILE", help=output)
    return parser


if __name__ == "__main__":
    sys.exit(main())
