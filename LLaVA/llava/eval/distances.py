"""Transport distances of methods on the pictures of benchmarks, measured with the model of the runs.

The pictures are those of the embedded suite, or of a folder. Methods that need a question, or attention inside the
decoder, have no distance before the decoder, and are left out.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from llava.mm_utils import get_model_name_from_path, process_images
from llava.model.llava_arch import ot_kernel
from llava.model.visual_sequence import ImageTokens, PromptFacts, reduce_images
from llava.pruning import PruningConfig
from llava.pruning.base import ENCODER_NEEDS, content_key

from .columns import COLUMNS
from .rows import Row
from .transport import gaussian_distance, log_det, wasserstein

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
    model : str
        Checkpoint folder, hub id or "llava-mini".
    device : str
    """

    def __init__(self, model: str, device: str = "cpu"):
        from llava.model.builder import load_pretrained_model

        self.dtype = torch.float32 if device == "cpu" else torch.float16
        _, self.model, self.processor, _ = load_pretrained_model(
            model, None, get_model_name_from_path(model), device=device, dtype=self.dtype
        )
        self._last: tuple[int, int] | None = None
        self._kernel: torch.Tensor | None = None

    @torch.no_grad()
    def encode(self, image: Image.Image, config: PruningConfig | None) -> ImageTokens:
        """A picture's visual tokens, with what the method asks of the encoder."""
        before = self.model.pruning
        self.model.set_pruning(config)
        try:
            return self.model.image_tokens([self._pixels(image)], [image.size])[0]
        finally:
            self.model.set_pruning(before)

    @torch.no_grad()
    def measure(self, image: Image.Image, config: PruningConfig) -> Measured:
        """A method's distances on a picture.

        Raises
        ------
        ValueError
            For a method that needs more than the picture, or a picture without tokens.
        """
        tokens = self.encode(image, config)
        if not len(tokens.features):
            raise ValueError("the picture has no visual tokens")
        key = content_key(self._pixels(image))
        kept = reduce_images(config.build_pruner(), [tokens], [PromptFacts(key=key)], config.ratio)[0]
        if self._last != (key, len(tokens.features)):
            self._last, self._kernel = (key, len(tokens.features)), ot_kernel(tokens.features)
        return Measured(
            len(kept.features),
            wasserstein(tokens.features, kept.features),
            gaussian_distance(tokens.features, kept.features),
            log_det(self._kernel, kept.indices),
        )

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        return process_images([image], self.processor, self.model.config)[0].to(self.model.device, self.dtype)


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


def mean_distance(
    encoder: Encoder, pictures: Sequence[Image.Image], config: PruningConfig
) -> tuple[float, float, float]:
    """Means over pictures of exact distance, Gaussian distance and log det."""
    found = [encoder.measure(picture, config) for picture in pictures]
    return tuple(
        sum(getattr(one, name) for one in found) / len(found) for name in ("wasserstein", "gaussian", "log_det")
    )


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
    for column in COLUMNS:
        task = next(suite.TASKS[name] for name in column.tasks if name in suite.TASKS)
        config = "testdev_balanced_images" if task.builtin == "gqa" else task.config
        distinct = dict.fromkeys(_stored(root / task.folder / config / f"{task.split}.parquet"))
        found[column.key] = [_opened(png) for png in list(distinct)[:number]]
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
    return [Image.open(path).convert("RGB") for path in paths[:number]]


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
