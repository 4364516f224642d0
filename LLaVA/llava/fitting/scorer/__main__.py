"""Train a scorer: a small network that predicts which visual tokens a model attends to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command import Parser, positive
from llava.fitting.options import add_samples, add_training, load, samples_of, steps_of


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 3 where the time of a training was up first."""
    return _parser().run(lambda arguments: arguments.action(arguments), argv)


def _gather(arguments: argparse.Namespace) -> None:
    from llava.fitting.prompts import Prompts
    from llava.fitting.scorer.attention import gather

    source = samples_of(arguments)
    tokenizer, model, processor, name = load(arguments)
    gather(model, processor, Prompts(source, tokenizer, model.config), arguments.output, name)
    print(f"{len(source)} images: {arguments.output}")


def _train(arguments: argparse.Namespace) -> int:
    from llava.fitting.scorer.train import Recipe, train
    from llava.train.loop import Run

    recipe = Recipe(
        hidden=arguments.hidden,
        epochs=arguments.epochs,
        batch=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    run = Run(arguments.output, resume=arguments.resume, seconds=60 * arguments.minutes)
    return 0 if train(arguments.attention, recipe, run) else 3


def _parser() -> Parser:
    parser = Parser("llava.fitting.scorer", __doc__)
    step = steps_of(parser, "gather or train")

    gather = step(_gather, "gather", "write visual tokens and the attention that questions pay them, a file per image")
    add_samples(gather, samples=800, seed=5)
    text = "folder (default: attention); the same command continues where it was"
    gather.add_argument("--output", type=Path, default=Path("attention"), metavar="DIR", help=text)

    train = step(_train, "train", "train a scorer on what was gathered")
    text = "of gather (default: attention)"
    train.add_argument("--attention", type=Path, default=Path("attention"), metavar="DIR", help=text)
    add_training(train, "scorer", epochs=20, batch=16, rate=2e-3, seed=0)
    train.add_argument("--hidden", type=positive, default=128, metavar="N", help="width of the network (default: 128)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
