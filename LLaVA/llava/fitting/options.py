"""What the commands of this room share: steps, options of data and training, and the model that is learnt from."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava.command import Parser, above_zero, find_device, positive, whole
from llava.fitting.data import MINI, Source, find_questions


def steps_of(parser: Parser, metavar: str) -> Callable[..., Parser]:
    """Gives a command its steps, which the function adds: (action, name, help, **options of the parser)."""
    steps = parser.add_subparsers(required=True, metavar=metavar, parser_class=Parser)

    def step(action: Callable[[argparse.Namespace], object], name: str, text: str, **options: Any) -> Parser:
        one = steps.add_parser(name, help=text, description=text, prog=f"{parser.prog} {name}", **options)
        one.set_defaults(action=action)
        return one

    return step


def add_samples(parser: Parser, samples: int, seed: int) -> None:
    """``--model`` and the questions that it is asked."""
    parser.add_model(base=True)
    parser.add_device()
    data = "mini (default): images and questions of the embedded world; pages: its pages to read; a benchmark task or "
    data += "group of lmms-eval, as gqa or otprune_mini, the embedded suite; or a JSON file in LLaVA's format"
    parser.add_argument("--data", default=MINI, help=data)
    folder = "of a JSON file's images (default: its own)"
    parser.add_argument("--image-folder", type=Path, metavar="DIR", help=folder)
    count = f"images with a question each (default: {samples})"
    parser.add_argument("--samples", type=int, default=samples, metavar="N", help=count)
    parser.add_argument("--seed", type=whole, default=seed, metavar="N", help=f"of the choice (default: {seed})")


def add_training(parser: Parser, output: str, epochs: int, batch: int, rate: float, seed: int) -> None:
    """Options of every training, with their defaults."""
    add = parser.add_argument
    add("--output", type=Path, default=Path(output), metavar="DIR", help=f"the {output}'s folder (default: {output})")
    add("--resume", action="store_true", help="continue from the last saved state")
    add("--epochs", type=positive, default=epochs, metavar="N", help=f"default: {epochs}")
    about = f"images per step, of all processes (default: {batch})"
    add("--batch-size", type=positive, default=batch, metavar="N", help=about)
    add("--learning-rate", type=above_zero, default=rate, metavar="R", help=f"default: {rate}")
    add("--seed", type=whole, default=seed, metavar="N", help=f"default: {seed}")
    add("--minutes", type=above_zero, default=math.inf, metavar="M", help="save and stop after this long")


def samples_of(arguments: argparse.Namespace) -> Source:
    """The questions; refused while the switch is on: what is learnt is learnt from the unpruned model."""
    from llava.pruning import PruningConfig

    if PruningConfig.from_env() is not None:
        raise ValueError(f"what {arguments.model} attends to is read off the unpruned model: unset BASELINE")
    return find_questions(arguments.data, arguments.samples, arguments.seed, arguments.image_folder)


def load(arguments: argparse.Namespace) -> tuple[Any, Any, Any, str]:
    """Tokenizer, model, image processor and the model's name; half precision on a GPU without ``--dtype``."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    device, name = find_device(arguments.device), get_model_name_from_path(arguments.model)
    dtype = getattr(arguments, "dtype", None) or ("float32" if device == "cpu" else "float16")
    base = getattr(arguments, "model_base", None)
    found = load_pretrained_model(arguments.model, base, name, device=device, dtype=dtype, multimodal=True)
    return *found[:3], name
