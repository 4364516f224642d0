"""A model up to its projector: what a method keeps of an image, and the images to look at."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from llava.eval.results.rows import Row
from llava.eval.views import View, views_of
from llava.images import load_rgb
from llava.mm_utils import get_model_name_from_path, process_images
from llava.model.llava_arch import ot_select
from llava.model.visual_cache import VisualCache
from llava.pruning import PruningConfig, kept_count, pruning
from llava.pruning.reduce import reduce_images
from llava.pruning.signals import ENCODER_SIGNALS
from llava.pruning.tokens import ImageTokens, KeptTokens

ENCODED_BYTES = 2**26
"""Of encoded images that are remembered: those of one image, and some more."""
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Encoder:
    """A LLaVA and its image processor, of which only what comes before the decoder is used."""

    def __init__(self, model: torch.nn.Module, processor: Any):
        self.model, self.processor = model, processor
        if model.visual_cache is None:  # methods differ in what they want of one image
            model.visual_cache = VisualCache(ENCODED_BYTES)

    @classmethod
    @lru_cache(maxsize=1)  # figures and token maps of a report look through one model
    def load(cls, path: str, device: str = "cpu") -> Encoder:
        """The model of a checkpoint folder, a hub id or "llava-mini"; float32 on a CPU, float16 elsewhere."""
        from llava.model.builder import load_pretrained_model

        dtype = torch.float32 if device == "cpu" else torch.float16
        name = get_model_name_from_path(path)
        logging.disable_progress_bar()
        _, model, processor, _ = load_pretrained_model(path, None, name, device=device, dtype=dtype, multimodal=True)
        return cls(model, processor)

    def views(self, image: Image.Image) -> list[View]:
        """The pictures that the image's visual tokens cover."""
        return views_of(image, self.model.config, self.model.get_vision_tower())

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """What the vision tower is given."""
        return process_images([image], self.processor, self.model.config)[0].to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def encode(self, image: Image.Image, config: PruningConfig) -> ImageTokens:
        """An image's visual tokens, with what the method specifies of the encoder; a `ValueError` if it has none."""
        with pruning(self.model, config):
            tokens = self.model.image_tokens([self.pixels(image)], [image.size])[0]
        if not len(tokens.features):
            raise ValueError("the image has no visual tokens")
        return tokens

    @torch.no_grad()
    def reduce(self, image: Image.Image, config: PruningConfig) -> tuple[ImageTokens, KeptTokens]:
        """All visual tokens, and those that go on; a `ValueError` for a method that needs more than the image."""
        tokens = self.encode(image, config)
        return tokens, reduce_images(config.build_pruner(), [tokens], config.ratio)[0]

    @torch.no_grad()
    def kept_order(self, image: Image.Image, config: PruningConfig) -> list[int]:
        """Tokens that a method keeps: in greedy order for OTPrune, as they go on for the others; see `reduce`."""
        pruner = config.build_pruner()
        if config.method != "otprune" or pruner.compat or pruner.per_crop:
            return self.reduce(image, config)[1].indices.tolist()
        features = self.encode(image, config).features
        gamma = pruner.for_width(features.shape[-1]).gamma
        return ot_select(features, kept_count(len(features), config.ratio), gamma).tolist()


def image_configs(row: Row) -> list[PruningConfig]:
    """A row's configurations, if they drop tokens before the decoder by what is in the image alone."""
    if not row.pruned or row.published or row.ratio is None or row.layer != 0:
        return []
    settings = [run.content["pruning"] for run in row.runs]
    configs = [PruningConfig(given["method"], row.ratio, options=given["options"]) for given in settings]
    configs = configs or [PruningConfig.from_text(text, row.ratio, {}) for text in row.texts]
    needs = frozenset().union(*(config.build_pruner().needs for config in configs))
    return configs if needs <= ENCODER_SIGNALS | {"image_keys"} else []


def images_of_suite(number: int) -> dict[str, list[Image.Image]]:
    """The first images of each benchmark of the embedded suite, by column key; fewer where it has fewer.

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
        folder = root / data.folder / (data.image_config or data.config)
        distinct = dict.fromkeys(_stored(folder / f"{data.split}.parquet"))
        found[benchmark.key] = [Image.open(io.BytesIO(png)).convert("RGB") for png in list(distinct)[:number]]
    return found


def images_of_folder(folder: Path, number: int) -> list[Image.Image]:
    """The first images of a folder, by name; a `ValueError` if it has none."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_FILES)
    if not paths:
        raise ValueError(f"{folder} has no images ({', '.join(IMAGE_FILES)})")
    return [load_rgb(path) for path in paths[:number]]


def _stored(path: Path) -> Iterator[bytes]:
    """The PNG files in a table, row by row: a column of images, of lists of them, or several columns."""
    from pyarrow import parquet

    for row in parquet.read_table(path).to_pylist():
        for value in row.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict) and isinstance(item.get("bytes"), bytes):
                    yield item["bytes"]
