"""Distances between all tokens of an image and those that methods keep.

    python -m llava.eval.distances --image cat.jpg --method otprune,divprune,random --ratio 0.098

Methods that drop inside the decoder are refused: before it, all tokens are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from llava.command import Parser, find_device, read_methods
from llava.eval.encoder import Encoder
from llava.eval.transport import gaussian_distance, guarantee, log_det, objective_kernel, wasserstein
from llava.images import load_image
from llava.pruning import PruningConfig, kept_count


@dataclass(frozen=True)
class Measured:
    """One image under one method: distances between all tokens and the kept (or merged) ones, OTPrune's objective."""

    kept: int
    wasserstein: float
    gaussian: float
    log_det: float


def measure(encoder: Encoder, image: Image.Image, config: PruningConfig, query: str = "") -> Measured:
    """A method's distances on an image; a `ValueError` for a method that drops inside the decoder."""
    tokens, kept = encoder.reduce(image, config, query)
    return Measured(
        len(kept.features),
        wasserstein(tokens.features, kept.features),
        gaussian_distance(tokens.features, kept.features),
        log_det(objective_kernel(tokens.features), kept.indices),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("llava.eval.distances", __doc__)
    parser.add_image()
    parser.add_model()
    parser.add_method("otprune,divprune,random,uniform")
    parser.add_ratio()
    parser.add_query()
    parser.add_device()
    return parser.run(_compare, argv)


def _compare(arguments: argparse.Namespace) -> None:
    """Print a line per method, and what the greedy selection guarantees."""
    configs = read_methods(arguments.method, arguments.ratio, {})
    image = load_image(arguments.image)
    encoder = Encoder.load(arguments.model, find_device(arguments.device))
    features = encoder.encode(image, next(iter(configs.values())), arguments.query).features
    wide = max(map(len, ("method", *configs))) + 2
    print(f"{len(features)} visual tokens, kept ratio {arguments.ratio:g}")
    print(f"{'method':{wide}}{'kept':>6}{'exact W2':>12}{'Gaussian W2':>14}{'log det':>12}")
    for text, config in configs.items():
        found = measure(encoder, image, config, arguments.query)
        print(f"{text:{wide}}{found.kept:6}{found.wasserstein:12.4f}{found.gaussian:14.4f}{found.log_det:12.4f}")
    sure = guarantee(objective_kernel(features), kept_count(len(features), arguments.ratio))
    print(f"greedy: log det {sure.value:.4f}, the best has at most {sure.bound:.4f} ({100 * sure.share:.1f} %)")


if __name__ == "__main__":
    raise SystemExit(main())
