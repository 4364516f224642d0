"""Transport distances of methods on the pictures of benchmarks, measured with the model of the runs.

    python -m llava.eval.distances --image cat.jpg --method otprune,divprune,random --ratio 0.098

The pictures are those of the embedded suite, or of a folder. Methods that need a question, or attention inside the
decoder, have no distance before the decoder, and are left out.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.command import Parser, find_device, read_methods
from llava.eval.results.rows import Row
from llava.eval.transport import gaussian_distance, guarantee, log_det, objective_kernel, wasserstein
from llava.images import load_image, load_rgb
from llava.mm_utils import get_model_name_from_path, process_images
from llava.model.visual_cache import VisualCache
from llava.model.visual_sequence import ImageTokens, PromptFacts, reduce_images
from llava.pruning import PruningConfig, kept_count, pruning
from llava.pruning.base import ENCODER_NEEDS, content_key

ENCODED_BYTES = 2**26
"""Of encoded images that are remembered: those of one picture, and some more."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Measured:
    """One picture under one method.

    Attributes
    ----------
    kept : int
    wasserstein, gaussian : float
        Distances between all tokens and those that go on (merged tokens as they are).
    log_det : float
        OTPrune's objective of the tokens' places.
    """

    kept: int
    wasserstein: float
    gaussian: float
    log_det: float


class Encoder:
    """A model, of which only what comes before the decoder is used.

    Parameters
    ----------
    model : LLaVA model
    processor : image processor
    """

    def __init__(self, model: torch.nn.Module, processor: Any):
        self.model, self.processor = model, processor
        self._picture: Image.Image | None = None
        self._pixels: torch.Tensor | None = None
        if model.visual_cache is None:  # methods differ in what they want of one image
            model.visual_cache = VisualCache(ENCODED_BYTES)
        self._kernel: torch.Tensor | None = None

    @classmethod
    def load(cls, path: str, device: str = "cpu") -> Encoder:
        """The model of a checkpoint folder, a hub id or "llava-mini"; float32 on a CPU, float16 elsewhere."""
        from llava.model.builder import load_pretrained_model

        dtype = torch.float32 if device == "cpu" else torch.float16
        _, model, processor, _ = load_pretrained_model(
            path, None, get_model_name_from_path(path), device=device, dtype=dtype, multimodal=True
        )
        return cls(model, processor)

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """What the vision tower is given."""
        return process_images([picture], self.processor, self.model.config)[0].to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def encode(self, picture: Image.Image, config: PruningConfig) -> ImageTokens:
        """A picture's visual tokens, with what the method asks of the encoder.

        Raises
        ------
        ValueError
            For a picture without visual tokens.
        """
        if picture is not self._picture:
            self._picture, self._pixels, self._kernel = picture, self.pixels(picture), None
        with pruning(self.model, config):
            tokens = self.model.image_tokens([self._pixels], [picture.size])[0]
        if not len(tokens.features):
            raise ValueError("the picture has no visual tokens")
        return tokens

    @torch.no_grad()
    def measure(self, picture: Image.Image, config: PruningConfig) -> Measured:
        """A method's distances on a picture.

        Raises
        ------
        ValueError
            For a method that needs more than the picture, or a picture without visual tokens.
        """
        tokens = self.encode(picture, config)
        facts = PromptFacts(key=content_key(self._pixels))
        kept = reduce_images(config.build_pruner(), [tokens], [facts], config.ratio)[0]
        if self._kernel is None:
            self._kernel = objective_kernel(tokens.features)
        return Measured(
            len(kept.features),
            wasserstein(tokens.features, kept.features),
            gaussian_distance(tokens.features, kept.features),
            log_det(self._kernel, kept.indices),
        )


def picture_configs(row: Row) -> list[PruningConfig]:
    """The configurations of a row's runs, if they drop tokens before the decoder by what is in the picture alone."""
    found = []
    for run in row.runs:
        pruning = run.content["pruning"]
        if pruning is None or pruning["ratio"] is None or pruning["layer"] != 0:
            return []
        config = PruningConfig(pruning["method"], pruning["ratio"], options=pruning["options"])
        if not config.build_pruner().needs <= ENCODER_NEEDS | {"image_keys"}:
            return []
        found.append(config)
    return found


def pictures_of_suite(number: int) -> dict[str, list[Image.Image]]:
    """The first pictures of each benchmark of the embedded suite, by column key; fewer where it has fewer.

    Raises
    ------
    ImportError
        Without the package datasets (the extra "train").
    """
    from llava.mini import suite

    root = suite.prepare()
    found = {}
    for benchmark in suite.TASKS.values():
        data = benchmark.data
        config = data.image_config or data.config
        distinct = dict.fromkeys(_stored(root / data.folder / config / f"{data.split}.parquet"))
        found[benchmark.key] = [_opened(png) for png in list(distinct)[:number]]
    return found


def pictures_of_folder(folder: Path, number: int) -> list[Image.Image]:
    """The first pictures of a folder, by name.

    Raises
    ------
    ValueError
        If it has none.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"{folder} has no pictures ({', '.join(PICTURES)})")
    return [load_rgb(path) for path in paths[:number]]


def _stored(path: Path) -> Iterator[bytes]:
    """The PNG files in a table, row by row: a column of pictures, of lists of them, or several columns."""
    from pyarrow import parquet

    for row in parquet.read_table(path).to_pylist():
        for value in row.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict) and isinstance(item.get("bytes"), bytes):
                    yield item["bytes"]


def _opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("llava.eval.distances", __doc__)
    parser.add_image()
    parser.add_model()
    parser.add_method("otprune,divprune,random,uniform")
    parser.add_ratio()
    parser.add_device()
    return parser.run(_compare, argv)


def _compare(arguments: argparse.Namespace) -> None:
    """Print a line per method, and what the greedy selection guarantees."""
    configs = read_methods(arguments.method, arguments.ratio, {})
    image = load_image(arguments.image)
    encoder = Encoder.load(arguments.model, find_device(arguments.device))
    full = encoder.encode(image, next(iter(configs.values())))
    wide = max(map(len, ("method", *configs))) + 2
    print(f"{len(full.features)} visual tokens, kept ratio {arguments.ratio:g}")
    print(f"{'method':{wide}}{'kept':>6}{'exact W2':>12}{'Gaussian W2':>14}{'log det':>12}")
    for text, config in configs.items():
        found = encoder.measure(image, config)
        print(f"{text:{wide}}{found.kept:6}{found.wasserstein:12.4f}{found.gaussian:14.4f}{found.log_det:12.4f}")
    sure = guarantee(objective_kernel(full.features), kept_count(len(full.features), arguments.ratio))
    print(f"greedy: log det {sure.value:.4f}, the best has at most {sure.bound:.4f} ({100 * sure.share:.1f} %)")


if __name__ == "__main__":
    raise SystemExit(main())
