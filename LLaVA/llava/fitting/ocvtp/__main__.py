"""Train OC-VTP's pruner for a model, and print what it costs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llava.command import Parser, positive, whole
from llava.fitting.options import add_training, load, steps_of


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 3 where the time of a training was up first."""
    return _parser().run(lambda arguments: arguments.action(arguments), argv)


def _extract(arguments: argparse.Namespace) -> None:
    from llava.fitting.data import find_images
    from llava.fitting.ocvtp.features import extract

    images = find_images(arguments.images).first(arguments.count)
    _, model, _, _ = load(arguments)
    described = extract(
        model.get_vision_tower(),
        arguments.model,
        images,
        arguments.output,
        layer=arguments.layer,
        shard=arguments.shard,
        batch=arguments.batch_size,
    )
    print(
        f"{described.count} images, {described.tokens} tokens of width {described.width} each, layer "
        f"{described.layer}: {arguments.output}"
    )


def _train(arguments: argparse.Namespace) -> int:
    from llava.fitting.ocvtp.objective import DecoderConfig
    from llava.fitting.ocvtp.train import Recipe, train
    from llava.pruning.methods.ocvtp.network import SlotConfig
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
        arguments.output,
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
            decoder=asdict(decoder),
        )

    return 0 if train(arguments.features, sizes, recipe, run, arguments.dtype) else 3


def _cost(arguments: argparse.Namespace) -> None:
    from llava.fitting.ocvtp.cost import cost

    print(cost(arguments.model, arguments.checkpoint, arguments.kept, arguments.text))


def _parser() -> Parser:
    parser = Parser("llava.fitting.ocvtp", __doc__)
    step = steps_of(parser, "extract, train or cost")

    extract = step(_extract, "extract", "write features of a model's frozen vision tower")
    extract.add_model()
    extract.add_device()
    add = extract.add_argument
    add("--images", required=True, help="a folder, scenes:N (drawn ones), or a task or group of lmms-eval")
    add("--layer", type=int, help="of the vision tower, from 0 (default: 8 for CLIP-L, else at the same depth)")
    text = "folder (default: features); the same command continues where it was"
    add("--output", type=Path, default=Path("features"), metavar="DIR", help=text)
    add("--count", type=positive, metavar="N", help="only the first N images")
    add("--shard", type=positive, default=64, metavar="N", help="images per file (default: 64)")
    add("--batch-size", type=positive, default=16, metavar="N", help="images at a time (default: 16)")

    several = "Several processes: accelerate launch --num_processes N -m llava.fitting.ocvtp train ..."
    train = step(_train, "train", "train a pruner on features", epilog=several)
    add_training(train, "pruner", epochs=30, batch=12, rate=1e-3, seed=42)
    add = train.add_argument
    add("--features", type=Path, default=Path("features"), help="folder of extract (default: features)")
    text = "slots of the validation; training draws S/4, S/2, S or 2S of them (default: 64)"
    add("--slots", type=positive, default=64, metavar="S", help=text)
    add("--warmup", type=whole, default=4, metavar="N", help="epochs of rising learning rate (default: 4)")
    add("--patience", type=positive, default=5, metavar="N", help="epochs without a better loss (default: 5)")
    add("--precision", choices=("no", "bf16"), default="no", help="of matrix products (default: no, float32)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the saved weights (default: float32)")
    add("--hidden", type=positive, metavar="N", help="width of the projection (default: twice the features')")
    add("--slot-width", type=positive, metavar="N", help="default: half of the features'")
    add("--decoder-layers", type=positive, default=4, metavar="N", help="default: 4")
    add("--decoder-heads", type=positive, default=4, metavar="N", help="default: 4")
    add("--decoder-feed-forward", type=positive, metavar="N", help="default: four times the features' width")

    cost = step(_cost, "cost", "print a pruner's FLOPs beside the model's")
    cost.add_model("1.5-7b", also="a shape of llava flops, ")
    add = cost.add_argument
    add("--checkpoint", help="a pruner (default: one of the published sizes for the model's vision tower)")
    add("--kept", type=positive, metavar="K", help="visual tokens kept (default: 0.098 of them)")
    add("--text", type=positive, default=60, metavar="N", help="text tokens (default: 60)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
