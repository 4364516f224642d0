"""The effective rank of images' visual tokens: the reference_rank that budget=effective_rank needs.

    python -m llava.eval.rank --model llava-mini

With it, the kept ratio holds in the mean over these images: an image keeps `ratio * N * rank / reference_rank` tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from llava.command import Parser, find_device, positive
from llava.eval.encoder import Encoder, images_of_folder, images_of_suite
from llava.pruning import PruningConfig
from llava.pruning.own_budget import effective_rank


def ranks_of(encoder: Encoder, images: Sequence[Image.Image]) -> list[tuple[int, float]]:
    """(visual tokens, effective rank) of each image, or of each tile where these have budgets of their own."""
    units = (unit for image in images for unit in encoder.units(image, PruningConfig("uniform", 0.5)))
    return [(len(one), effective_rank(one.features)) for one in units]


def reference_rank(ranks: Sequence[tuple[int, float]]) -> float:
    """The mean rank, weighted by tokens, so that the kept tokens of all images together meet the ratio."""
    return sum(tokens * rank for tokens, rank in ranks) / sum(tokens for tokens, _ in ranks)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("llava.eval.rank", __doc__)
    parser.add_model()
    about = "images of each benchmark, or of the folder (default: 32)"
    parser.add_argument("--images", type=positive, default=32, metavar="N", help=about)
    about = "images to measure (default: the embedded suite's)"
    parser.add_argument("--image-folder", type=Path, metavar="DIR", help=about)
    parser.add_device()
    return parser.run(_measure, argv)


def _measure(found: argparse.Namespace) -> None:
    folder, number = found.image_folder, found.images
    groups = images_of_suite(number) if folder is None else {str(folder): images_of_folder(folder, number)}
    encoder = Encoder.load(found.model, find_device(found.device))
    every: list[tuple[int, float]] = []
    for name, images in groups.items():
        own = ranks_of(encoder, images)
        every += own
        values = [rank for _, rank in own]
        print(f"{name}: {len(images)} images, mean {reference_rank(own):.1f}, {min(values):.1f} to {max(values):.1f}")
    print(f"reference_rank={reference_rank(every):.1f}")


if __name__ == "__main__":
    raise SystemExit(main())
