"""Which tokens methods keep of images, in a LLaVA or a model of transformers, and the images to look at."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from llava import hf
from llava.adapters.transformers.images import tiles as tiles_of
from llava.benchmarks import PAPER
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import choose_conv_mode, conv_templates, image_mark
from llava.eval.results.rows import Row
from llava.eval.views import Part, Tile, View, locate, parts_of, pictures_of
from llava.images import load_rgb
from llava.mm_utils import get_model_name_from_path, images_to, process_images, tokenizer_image_token
from llava.model.image_tokens import tokens_in_prompts
from llava.model.llava_arch import OTPrune, ot_select
from llava.model.visual_cache import VisualCache
from llava.pruning import PruningConfig, pruning
from llava.pruning.base import INSIDE
from llava.pruning.own_budget import count_of
from llava.pruning.reduce import reduce_images
from llava.pruning.signals import ENCODER_SIGNALS
from llava.pruning.tokens import ImageTokens, KeptTokens, Layout

ENCODED_BYTES = 2**26
"""Size of the cache of encoded images: one image's, and some more."""
EVERYTHING = PruningConfig("first_k", 1.0)
Images = Sequence[Image.Image]
Kept = list[tuple[int, list[int]]]
"""Of each image of a prompt, the number of its visual tokens and the indices of kept ones."""
Encoded = tuple[list[list[ImageTokens]], Any, float]
"""Of each image what has a budget of its own; the method; the fraction that it keeps."""
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Encoder:
    """A LLaVA and its image processor, and what methods keep of images."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    @staticmethod
    @lru_cache(maxsize=1)  # figures and token maps of a report look through one model
    def load(path: str, device: str = "cpu") -> Encoder:
        """The model of a checkpoint folder or a hub id, or an embedded one; float32 on a CPU, float16 elsewhere."""
        dtype = torch.float32 if device == "cpu" else torch.float16
        logging.disable_progress_bar()
        if hf.holds(path):
            return TransformersEncoder(*hf.load(path, device, dtype))
        from llava.model.builder import load_pretrained_model

        name = get_model_name_from_path(path)
        _, model, processor, _ = load_pretrained_model(path, None, name, device=device, dtype=dtype, multimodal=True)
        if model.visual_cache is None:  # methods differ in what they want of one image
            model.visual_cache = VisualCache(ENCODED_BYTES)
        return Encoder(model, processor)

    @torch.no_grad()
    def views(self, images: Images) -> list[list[View]]:
        """The views that each image's visual tokens cover."""
        parts: list[list[Part]] = [[] for _ in images]
        first = [0] * len(images)
        for number, tokens, tiles in self._located(images):
            parts[number] += parts_of(_known(tokens), tiles, images[number].size, first[number])
            first[number] += len(tokens)
        return [pictures_of(image, own) for image, own in zip(images, parts, strict=True)]

    def encode(self, image: Image.Image, config: PruningConfig, query: str = "") -> ImageTokens:
        """An image's visual tokens, with the signals that the method needs; a `ValueError` if there are none."""
        units = self.units(image, config, query)
        return _joined(units, reduce_images(None, units, 1.0))[0]

    def units(self, image: Image.Image, config: PruningConfig, query: str = "") -> list[ImageTokens]:
        """The same per budget: of the image, or in some models of each of its tiles."""
        [units], _, _ = self._encoded([image], config, query)
        return units

    def reduce(self, image: Image.Image, config: PruningConfig, query: str = "") -> tuple[ImageTokens, KeptTokens]:
        """All visual tokens, and those that go on; a `ValueError` for a method that drops inside the decoder."""
        [units], pruner, fraction = self._encoded([image], config, query)
        return _joined(units, reduce_images(pruner, units, fraction))

    def kept_order(self, image: Image.Image, config: PruningConfig, query: str = "") -> list[int]:
        """`kept` of one image, without the total."""
        return self.kept([image], config, query)[0][1]

    def kept(self, images: Images, config: PruningConfig, query: str = "") -> Kept:
        """The tokens that a method keeps of each image of a prompt.

        In greedy order for OTPrune, in that of the prompt for the others; of a method that drops inside the decoder,
        those left after its last drop.
        """
        if _drops_inside(config):
            return self._left_inside(images, config, query)
        encoded, pruner, fraction = self._encoded(images, config, query)
        return [_end_to_end(map(len, own), [_order(pruner, unit, fraction) for unit in own]) for own in encoded]

    @torch.no_grad()
    def _encoded(self, images: Images, config: PruningConfig, query: str) -> Encoded:
        _refuse_inside(config)
        with pruning(self.model, config):
            active = self.model.active_pruner
            reads = active.needs("question") or active.needs("text_similarity")
            ids = self._ids(images, query) if reads else torch.empty(0)
            row, sizes = (ids, torch.full_like(ids, IGNORE_INDEX)), [image.size for image in images]
            found = tokens_in_prompts(self.model, self._pixels(images), sizes, [row], [range(len(images))])
        if not all(map(len, found)):
            raise ValueError("the image has no visual tokens")
        return [[one] for one in found], active.pruner, active.schedule[0][1]

    @torch.no_grad()
    def _left_inside(self, images: Images, config: PruningConfig, query: str) -> Kept:
        with pruning(self.model, config):
            ids = self._ids(images, query)[None].to(self.model.device)
            self.model(ids, images=self._pixels(images), image_sizes=[image.size for image in images])
            prefill = self.model.latest_prefill
        left = [prefill.tokens_left(number).tolist() for number in range(len(images))]
        return [(total, own) for (total, _), own in zip(prefill.token_counts, left, strict=True)]

    def _pixels(self, images: Images) -> Any:
        pixels = process_images(list(images), self.processor, self.model.config)
        return images_to(pixels, self.model.device, self.model.dtype)

    def _located(self, images: Images) -> Iterator[tuple[int, ImageTokens, list[Tile | None]]]:
        """What has a budget of its own: its image's number, its tokens, and what its tiles show."""

        def tiles(shown: list[Image.Image]) -> list[list[torch.Tensor]]:
            pixels = process_images(shown, self.processor, self.model.config)
            return [list(own) if own.ndim == 4 else [own] for own in pixels]

        encoded, _, _ = self._encoded(images, EVERYTHING, "")
        found = locate(tiles, [image.size for image in images])
        return ((number, tokens, found[number]) for number, [tokens] in enumerate(encoded))

    def _ids(self, images: Images, query: str) -> torch.Tensor:
        """A prompt (T,) with marks, on the host."""
        config, tokenizer = self.model.config, self.model.prompt_tokenizer
        conversation = conv_templates[choose_conv_mode(config.name_or_path, None, config, tokenizer)].copy()
        conversation.append_message(conversation.roles[0], f"{image_mark(config)}\n" * len(images) + query)
        conversation.append_message(conversation.roles[1], None)
        return tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")


class TransformersEncoder(Encoder):
    """The same of a model of transformers and its processor."""

    @torch.no_grad()
    def _encoded(self, images: Images, config: PruningConfig, query: str) -> Encoded:
        _refuse_inside(config)
        with pruning(self.model, config) as session:
            inputs, units = session.encode(self._inputs(images, query))
        own = self._by_image(images, inputs, units, [unit.tokens for unit in units])
        return own, session.pruner, session.schedule[0][1]

    @torch.no_grad()
    def _left_inside(self, images: Images, config: PruningConfig, query: str) -> Kept:
        with pruning(self.model, config) as session:
            inputs, units = session.encode(self._inputs(images, query))
            self.model(**inputs)
            left = [(len(unit.tokens), indices.tolist()) for unit, indices in zip(units, session.kept, strict=True)]
        return [_end_to_end(*zip(*own, strict=True)) for own in self._by_image(images, inputs, units, left)]

    def _inputs(self, images: Images, query: str = "") -> dict[str, Any]:
        return dict(hf.prompt(self.processor, [*images, query]).to(self.model.device, self.model.dtype))

    def _located(self, images: Images) -> Iterator[tuple[int, ImageTokens, list[Tile | None]]]:
        with pruning(self.model, EVERYTHING) as session:
            inputs, units = session.encode(self._inputs(images))
        tiles = self._tiles(images, inputs, units)
        return ((_image_of(own), unit.tokens, own) for unit, own in zip(units, tiles, strict=True))

    def _by_image(self, images: Images, inputs: dict, units: Sequence[Any], values: Sequence) -> list:
        """The values of the units, by image."""
        if len(images) == 1:
            return [list(values)]
        found: list[list] = [[] for _ in images]
        for value, tiles in zip(values, self._tiles(images, inputs, units), strict=True):
            found[_image_of(tiles)].append(value)
        return found

    def _tiles(self, images: Images, inputs: dict, units: Sequence[Any]) -> list[list[Tile | None]]:
        """What the tiles of each unit, which has a budget of its own, show."""
        base, entries = self.model.base_model, len(inputs["mm_encoder_outputs"]["image"].encoding.entries)
        found = locate(
            lambda shown: tiles_of(base, hf.prompt(self.processor, [*shown, ""]), entries),
            [image.size for image in images],
        )
        if len(units) == len(found):
            return found
        every = chain.from_iterable(found)  # a unit for each tile, or for several
        return [list(islice(every, len(_known(unit.tokens)))) for unit in units]


def _known(tokens: ImageTokens) -> Layout:
    if tokens.layout is None:
        raise ValueError("how the visual tokens of this model lie on an image is not known")
    return tokens.layout


def _image_of(tiles: Sequence[Tile | None]) -> int:
    return next(tile.image for tile in tiles if tile is not None)


def _drops_inside(config: PruningConfig) -> bool:
    return config.build_pruner().where == INSIDE or config.layer != 0


def _refuse_inside(config: PruningConfig) -> None:
    if _drops_inside(config) and config.build_pruner().later is None:
        raise ValueError(f"{config.method} drops tokens inside the decoder, and none before it")


def _order(pruner: Any, unit: ImageTokens, fraction: float) -> list[int]:
    """The tokens that a method keeps of a unit, in greedy order for OTPrune."""
    if not isinstance(pruner, OTPrune) or pruner.compat or pruner.per_crop or pruner.drop_duplicates:
        return reduce_images(pruner, [unit], fraction)[0].indices.tolist()
    gamma = pruner.for_width(unit.features.shape[-1]).gamma
    return ot_select(unit.features, count_of(pruner, unit.features, fraction), gamma).tolist()


def _end_to_end(lengths: Iterable[int], indices: Iterable[Sequence[int]]) -> tuple[int, list[int]]:
    """The units' total length, and indices into each as indices into all of them."""
    *starts, total = accumulate(lengths, initial=0)
    return total, [start + index for start, own in zip(starts, indices, strict=True) for index in own]


def _joined(units: Sequence[ImageTokens], kept: Sequence[KeptTokens]) -> tuple[ImageTokens, KeptTokens]:
    """Units as one image."""
    if len(units) == 1:
        return units[0], kept[0]
    _, indices = _end_to_end(map(len, units), [one.indices.tolist() for one in kept])
    every = ImageTokens(torch.cat([unit.features for unit in units]))
    return every, KeptTokens(torch.cat([one.features for one in kept]), torch.tensor(indices))


def image_configs(row: Row) -> list[PruningConfig]:
    """A row's configurations, if they drop tokens before the decoder and by the image alone."""
    if not row.pruned or row.published or row.ratio is None or row.layer != 0:
        return []
    settings = [run.content["pruning"] for run in row.runs]
    configs = [PruningConfig(given["method"], row.ratio, options=given["options"]) for given in settings]
    configs = configs or [PruningConfig.from_text(text, row.ratio, {}) for text in row.texts]
    needs = frozenset().union(*(config.build_pruner().needs for config in configs))
    return configs if needs <= ENCODER_SIGNALS | {"image_keys"} else []


def images_of_suite(number: int, group: str = PAPER) -> dict[str, list[Image.Image]]:
    """The first images of each embedded benchmark of a group, by column key; fewer where it has fewer.

    Without the package datasets (the extra "train") it is an `ImportError`.
    """
    from llava.mini import suite

    root = suite.prepare(group=group)
    found = {}
    for benchmark in suite.tasks_of(group).values():
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
