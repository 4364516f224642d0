"""Train a scorer: a small network that predicts which visual tokens a model attends to."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command import Parser, above_zero, find_device, positive
from llava.fitting.data import MINI


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 3 where the time of a training was up first."""
    return _parser().run(lambda arguments: arguments.action(arguments), argv)


def _gather(arguments: argparse.Namespace) -> None:
    from llava.fitting.data import find_questions
    from llava.fitting.fitprune.statistics import Prompts
    from llava.fitting.scorer.attention import gather
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.pruning import PruningConfig

    if PruningConfig.from_env() is not None:
        raise ValueError("attention is gathered in the unpruned model: unset BASELINE")
    source = find_questions(arguments.data, arguments.samples, arguments.seed, arguments.image_folder)
    device, name = find_device(arguments.device), get_model_name_from_path(arguments.model)
    tokenizer, model, processor, _ = load_pretrained_model(
        arguments.model,
        arguments.model_base,
        name,
        device=device,
        dtype="float32" if device == "cpu" else "float16",
        multimodal=True,
    )
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
    steps = parser.add_subparsers(required=True, metavar="gather or train", parser_class=Parser)

    def step(action, name: str, text: str) -> Parser:
        one = steps.add_parser(name, help=text, description=text, prog=f"{parser.prog} {name}")
        one.set_defaults(action=action)
        return one

    gather = step(_gather, "gather", "write visual tokens and the attention that questions pay them, a file per image")
    gather.add_model(base=True)
    gather.add_device()
    add = gather.add_argument
    text = "mini (default), a benchmark task or group of lmms-eval, or a JSON file in LLaVA's format"
    add("--data", default=MINI, help=text)
    add("--image-folder", type=Path, metavar="DIR", help="of a JSON file's images (default: its own)")
    add("--samples", type=int, default=800, metavar="N", help="images with a question each (default: 800)")
    add("--seed", type=int, default=5, metavar="N", help="of the choice of samples (default: 5)")
    text = "folder (default: attention); the same command continues where it was"
    add("--output", type=Path, default=Path("attention"), metavar="DIR", help=text)

    add = step(_train, "train", "train a scorer on what was gathered").add_argument
    add("--attention", type=Path, default=Path("attention"), metavar="DIR", help="of gather (default: attention)")
    add("--output", type=Path, default=Path("scorer"), metavar="DIR", help="the scorer's folder (default: scorer)")
    add("--resume", action="store_true", help="continue from the last saved state")
    add("--hidden", type=positive, default=128, metavar="N", help="width of the network (default: 128)")
    add("--epochs", type=positive, default=20, metavar="N", help="default: 20")
    add("--batch-size", type=positive, default=16, metavar="N", help="images per step (default: 16)")
    add("--learning-rate", type=above_zero, default=2e-3, metavar="R", help="default: 0.002")
    add("--seed", type=int, default=0, metavar="N", help="default: 0")
    add("--minutes", type=above_zero, default=math.inf, metavar="M", help="save and stop after this long")
    return parser


if __name__ == "__main__":
    sys.exit(main())
