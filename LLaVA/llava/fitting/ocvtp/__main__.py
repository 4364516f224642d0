"""Train OC-VTP's pruner for a model, and say what it costs."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from llava.command import above_zero, positive, whole
from llava.runtime import print_everything


def main(argv: list[str] | None = None) -> int:
    """The command line; exits with 2 and one sentence when what was asked for cannot be."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        print(f"ocvtp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ocvtp: interrupted", file=sys.stderr)
        return 130


def _extract(arguments: argparse.Namespace) -> int:
    from llava.fitting.ocvtp.extract import extract
    from llava.fitting.ocvtp.pictures import find_pictures
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    pictures = find_pictures(arguments.images).first(arguments.count)
    dtype = torch.float32 if arguments.device == "cpu" else torch.float16
    name = get_model_name_from_path(arguments.model)
    _, model, _, _ = load_pretrained_model(
        arguments.model, None, name, device=arguments.device, dtype=dtype, multimodal=True
    )
    description = extract(
        model.get_vision_tower(),
        arguments.model,
        pictures,
        arguments.images,
        arguments.output,
        layer=arguments.layer,
        shard=arguments.shard,
        batch=arguments.batch_size,
    )
    print(
        f"{description.count} pictures, {description.tokens} tokens of width {description.width} each, layer "
        f"{description.layer}: {arguments.output}"
    )
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from llava.fitting.ocvtp.train import Recipe, train
    from llava.pruning.methods.ocvtp.config import DecoderConfig, SlotConfig
    from llava.train.loop import Run

    recipe = Recipe(
        slots=arguments.slots,
        epochs=arguments.epochs,
        warmup=arguments.warmup,
        batch=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        patience=arguments.patience,
        seed=arguments.seed,
    )
    run = Run(
        folder=arguments.output,
        resume=arguments.resume,
        seconds=60 * arguments.minutes,
        precision=arguments.precision,
    )

    def sizes(description) -> SlotConfig:
        width = description.width
        decoder = DecoderConfig(
            tokens=description.tokens,
            width=width,
            heads=arguments.decoder_heads,
            layers=arguments.decoder_layers,
            feed_forward=arguments.decoder_feed_forward or 4 * width,
        )
        slot_width = arguments.slot_width or width // 2
        return SlotConfig(
            width=width,
            hidden=arguments.hidden or 2 * width,
            slot_width=slot_width,
            feed_forward=4 * slot_width,
            layer=description.layer,
            slots=arguments.slots,
            decoder=decoder,
        )

    return 0 if train(arguments.features, sizes, recipe, run, arguments.dtype) else 3


def _cost(arguments: argparse.Namespace) -> int:
    from llava.fitting.ocvtp.cost import cost

    print(cost(arguments.model, arguments.checkpoint, arguments.kept, arguments.text, arguments.device, arguments.time))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.fitting.ocvtp", description=__doc__)
    steps = parser.add_subparsers(required=True, metavar="extract, train or cost")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    step = steps.add_parser("extract", help="write features of a model's frozen vision tower")
    step.set_defaults(run=_extract)
    add = step.add_argument
    add("--model", default="llava-mini", help="checkpoint folder or hub id (default: llava-mini)")
    add("--images", required=True, help="a folder, scenes:N (drawn ones), or a task or group of lmms-eval")
    add("--layer", type=int, help="of the vision tower, from 0 (default: 8 for CLIP-L, else at the same depth)")
    add("--output", type=Path, default=Path("features"), help="folder (default: features); the same command goes on")
    add("--count", type=positive, metavar="N", help="only the first N pictures")
    add("--shard", type=positive, default=64, metavar="N", help="pictures a file (default: 64)")
    add("--batch-size", type=positive, default=16, metavar="N", help="pictures at a time (default: 16)")
    add("--device", default=device, help=f"default: {device}")

    step = steps.add_parser(
        "train",
        help="train a pruner on features",
        epilog="Several processes: accelerate launch --num_processes N -m llava.fitting.ocvtp train ...",
    )
    step.set_defaults(run=_train)
    add = step.add_argument
    add("--features", type=Path, default=Path("features"), help="folder of extract (default: features)")
    add("--output", type=Path, default=Path("pruner"), help="the pruner's folder (default: pruner)")
    add("--resume", action="store_true", help="go on from the last saved state")
    text = "slots of the validation; training draws S/4, S/2, S or 2S of them (default: 64)"
    add("--slots", type=positive, default=64, metavar="S", help=text)
    add("--epochs", type=positive, default=30, metavar="N", help="default: 30")
    add("--warmup", type=whole, default=4, metavar="N", help="epochs of rising learning rate (default: 4)")
    add("--batch-size", type=positive, default=12, metavar="N", help="pictures a step, of all processes (default: 12)")
    add("--learning-rate", type=above_zero, default=1e-3, metavar="R", help="default: 0.001")
    add("--patience", type=positive, default=5, metavar="N", help="epochs without a better loss (default: 5)")
    add("--seed", type=int, default=42, metavar="N", help="default: 42")
    add("--minutes", type=above_zero, default=math.inf, metavar="M", help="save and stop after this long")
    add("--precision", choices=("no", "bf16"), default="no", help="of matrix products (default: no, float32)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the saved weights (default: float32)")
    add("--hidden", type=positive, metavar="N", help="width of the projection (default: twice the features')")
    add("--slot-width", type=positive, metavar="N", help="default: half of the features'")
    add("--decoder-layers", type=positive, default=4, metavar="N", help="default: 4")
    add("--decoder-heads", type=positive, default=4, metavar="N", help="default: 4")
    add("--decoder-feed-forward", type=positive, metavar="N", help="default: four times the features' width")

    step = steps.add_parser("cost", help="a pruner's FLOPs and milliseconds beside the model's")
    step.set_defaults(run=_cost)
    add = step.add_argument
    add("--model", default="1.5-7b", help="a shape of llava.eval.flops, or a checkpoint (default: 1.5-7b)")
    add("--checkpoint", help="a pruner (default: one of the published sizes for the model's vision tower)")
    add("--kept", type=positive, metavar="K", help="visual tokens kept (default: 0.098 of them)")
    add("--text", type=positive, default=60, metavar="N", help="text tokens (default: 60)")
    add("--time", action="store_true", help="measure milliseconds, with random weights of the same shapes")
    add("--device", default=device, help=f"where to measure (default: {device})")
    return parser


if __name__ == "__main__":
    print_everything()
    sys.exit(main())
