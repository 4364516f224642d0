"""The sizes that a model's cost depends on, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava.benchmarks import BENCHMARKS, PAPER
from llava.flops.made_up import transformers_config

BENCHMARK_TOKENS = {
    benchmark.key: benchmark.tokens for benchmark in BENCHMARKS if benchmark.group == PAPER and benchmark.tokens
}
"""What the papers average over: benchmark -> text tokens and LLaVA-1.6's visual tokens."""

USUAL_TEXT = 60
"""Text tokens of a short question and Vicuna's system prompt."""


CHUNK = 64
"""Tokens that linear attention takes at a time."""


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of a layer, or of encoding an image.

    Attributes
    ----------
    linear, quadratic, chunk : int
        Per token, per pair of tokens, and per started `CHUNK` of tokens.
    rest : int
        Per token that is left after the attention, where tokens may be dropped there.
    """

    linear: int
    quadratic: int = 0
    rest: int = 0
    chunk: int = 0

    def attention(self, tokens: int, squares: int) -> int:
        """Up to the attention: of the number of tokens that enter a layer and its square, or of sums of both."""
        return self.linear * tokens + self.quadratic * squares

    def layer(self, tokens: int, squares: int) -> int:
        """Of a layer that drops nothing."""
        return self.attention(tokens, squares) + self.rest * tokens

    def flops(self, n: int, after: int | None = None) -> int:
        """Two per multiply-accumulate, for n tokens, of which ``after`` stay after the attention; all if left out."""
        left = n if after is None else after
        return 2 * (self.attention(n, n**2) + self.rest * left + self.chunk * -(-n // CHUNK))


@dataclass(frozen=True)
class DecoderShape:
    """A decoder: width and feed-forward width (d and m of the papers), vocabulary, and what each layer costs."""

    hidden: int
    intermediate: int
    vocabulary: int
    costs: tuple[Cost, ...]

    @property
    def layers(self) -> int:
        return len(self.costs)

    @classmethod
    def llama(
        cls, hidden: int, intermediate: int, layers: int, query_width: int, key_width: int, vocabulary: int
    ) -> DecoderShape:
        """Equal layers of attention and a gated feed-forward block.

        ``query_width`` and ``key_width`` are heads times head width, of the queries and of keys and values each.
        """
        layer = Cost(
            linear=hidden * (query_width + 2 * key_width),
            quadratic=2 * query_width,
            rest=hidden * query_width + 3 * hidden * intermediate,
        )
        return cls(hidden, intermediate, vocabulary, (layer,) * layers)

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """From a configuration like `LlamaConfig` or `MistralConfig`; a `ValueError` names a size that it lacks."""
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        head_width = getattr(config, "head_dim", None) or hidden // heads
        return cls.llama(
            hidden=hidden,
            intermediate=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers"),
            query_width=heads * head_width,
            key_width=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
            vocabulary=_size(config, "vocab_size"),
        )


@dataclass(frozen=True)
class TowerShape:
    """A CLIP vision tower, per crop.

    ``layers`` are those that run: the tower stops at the layer that LLaVA reads. ``patch_values`` are a patch's values
    (channels times its area), ``outputs`` the vectors that go on to the projector.
    """

    hidden: int
    intermediate: int
    layers: int
    patches: int
    patch_values: int
    outputs: int

    @classmethod
    def of(cls, config: Any, select_layer: int = -2, select_feature: str = "patch") -> TowerShape:
        """From a configuration like `CLIPVisionConfig`; a `ValueError` names a size that it lacks.

        ``select_layer`` is ``mm_vision_select_layer``, an index into the hidden states; ``select_feature`` is
        ``mm_vision_select_feature``, "patch" or "cls_patch".
        """
        layers, patch = _size(config, "num_hidden_layers"), _size(config, "patch_size")
        patches = (_size(config, "image_size") // patch) ** 2
        return cls(
            hidden=_size(config, "hidden_size"),
            intermediate=_size(config, "intermediate_size"),
            layers=select_layer if select_layer >= 0 else layers + 1 + select_layer,
            patches=patches,
            patch_values=getattr(config, "num_channels", 3) * patch**2,
            outputs=patches + (select_feature == "cls_patch"),
        )

    @property
    def cost(self) -> Cost:
        """Of a crop: the patches' embedding, then the layers over the patches and [CLS]."""
        n, d = self.patches + 1, self.hidden
        layer = 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * self.intermediate
        return Cost(self.patches * self.patch_values * d + self.layers * layer)


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model: its decoder, and what encoding an image costs.

    Attributes
    ----------
    decoder : DecoderShape
    tower, projector : Cost
        Of the image's crops; where images are read whole, of their visual tokens, and ``crops`` is their number.
    visual_tokens : int
        Of an image with all its crops. Unpadding and newline tokens of LLaVA-1.6 change it by a few per cent.
    crops : int
        Per image, base view included: 1, or the most that an anyres model makes.
    """

    decoder: DecoderShape
    tower: Cost
    projector: Cost
    visual_tokens: int
    crops: int = 1

    @property
    def reads_whole(self) -> bool:
        """Whether images of any size are read as they are, and not in crops of one size."""
        return self.crops == self.visual_tokens

    @classmethod
    def llava(cls, decoder: DecoderShape, tower: TowerShape, projector_layers: int, crops: int = 1) -> ModelShape:
        """A LLaVA with so many linear layers between tower and decoder (0 for "identity")."""
        inner = tower.hidden + (projector_layers - 1) * decoder.hidden if projector_layers else 0
        projector = Cost(tower.outputs * decoder.hidden * inner)
        return cls(decoder, tower.cost, projector, crops * tower.outputs, crops)

    @classmethod
    def of(cls, config: Any, vision_config: Any) -> ModelShape:
        """From a LLaVA's configuration and its vision tower's.

        A `ValueError` names a size that a configuration lacks, or an unknown projector.
        """
        return cls.llava(
            DecoderShape.of(config),
            _tower(config, vision_config),
            _projector_layers(getattr(config, "mm_projector_type", "linear")),
            _most_crops(config, vision_config.image_size),
        )


def load_shape(model: str, visual: int | None = None, crops: int | None = None) -> ModelShape:
    """The shape of a model, of which only the configuration is read.

    ``model`` is a name in `SHAPES`, a checkpoint, or a model of transformers (see
    `llava.flops.made_up.transformers_config`); ``visual`` and ``crops`` are those of the image, if not the usual ones.
    A missing checkpoint is an `OSError`, a cost that cannot be counted a `ValueError`.
    """
    other = None if model in SHAPES else transformers_config(model)
    if other is not None:
        from llava.flops.families import family_shape

        return family_shape(other, visual, crops)
    try:
        shape = SHAPES[model] if model in SHAPES else ModelShape.of(*_configurations(model))
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None
    return replace(shape, visual_tokens=visual or shape.visual_tokens, crops=crops or shape.crops)


def load_tower(model: str) -> TowerShape:
    """The vision tower of a LLaVA; raises as `load_shape`."""
    return TowerShape.of(_CLIP_L_336) if model in SHAPES else _tower(*_configurations(model))


def _configurations(model: str) -> tuple[Any, Any]:
    """A LLaVA's configuration, and its vision tower's."""
    from llava.model.checkpoint import read_config, resolve_model_path

    path = resolve_model_path(model)
    config = SimpleNamespace(**read_config(path))
    tower = getattr(config, "mm_vision_tower", None)
    if not isinstance(tower, str):
        raise ValueError(f"{model} is no LLaVA: its configuration names no vision tower (mm_vision_tower)")
    return config, _vision_config(path, tower)


def _tower(config: Any, vision_config: Any) -> TowerShape:
    return TowerShape.of(
        vision_config,
        getattr(config, "mm_vision_select_layer", -2),
        getattr(config, "mm_vision_select_feature", "patch"),
    )


def _vision_config(checkpoint: str, tower: str) -> Any:
    folder = next((str(place) for place in (Path(tower), Path(checkpoint, tower)) if place.is_dir()), None)
    if folder is None and tower == "openai/clip-vit-large-patch14-336":
        return _CLIP_L_336
    from transformers import CLIPVisionConfig

    try:
        return CLIPVisionConfig.from_pretrained(folder or tower)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"Cannot read the configuration of the vision tower {tower!r}: {reason}") from error


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"the configuration must state {name}, a whole number >= 1, not {value!r}")
    return value


def _projector_layers(kind: str) -> int:
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    depth = kind.removeprefix("mlp").removesuffix("x_gelu")
    if kind != f"mlp{depth}x_gelu" or not depth.isdecimal():
        raise ValueError(f"Unknown projector type: {kind}")
    return int(depth)


def _most_crops(config: Any, side: int) -> int:
    """Crops of a large square image, base view included."""
    if getattr(config, "image_aspect_ratio", None) != "anyres":
        return 1
    from llava.mm_utils import get_anyres_image_grid_shape

    across, down = get_anyres_image_grid_shape((10_000, 10_000), config.image_grid_pinpoints, side)
    return 1 + across * down


_CLIP_L_336 = SimpleNamespace(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=336, patch_size=14
)
_VICUNA_7B = DecoderShape.llama(4096, 11008, layers=32, query_width=4096, key_width=4096, vocabulary=32000)
_VICUNA_13B = DecoderShape.llama(5120, 13824, layers=40, query_width=5120, key_width=5120, vocabulary=32000)

SHAPES = {
    f"{generation}-{size}": ModelShape.llava(decoder, TowerShape.of(_CLIP_L_336), projector_layers=2, crops=crops)
    for generation, crops in (("1.5", 1), ("1.6", 5))
    for size, decoder in (("7b", _VICUNA_7B), ("13b", _VICUNA_13B))
}
"""The published LLaVAs on Vicuna."""
