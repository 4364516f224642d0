"""The sizes that a model's cost depends on, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava.benchmarks import BENCHMARKS, PAPER

BENCHMARK_TOKENS = {
    benchmark.key: benchmark.tokens for benchmark in BENCHMARKS if benchmark.group == PAPER and benchmark.tokens
}
"""What the papers average over: benchmark -> text tokens and LLaVA-1.6's visual tokens."""

USUAL_TEXT = 60
"""Text tokens of a short question and Vicuna's system prompt."""


@dataclass(frozen=True)
class DecoderShape:
    """A Llama-like decoder: width, feed-forward width (d and m of the papers) and layers.

    ``query_width`` and ``key_width`` are heads times head width, of the queries and of keys and values each.
    """

    hidden: int
    intermediate: int
    layers: int
    query_width: int
    key_width: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """From a configuration like `LlamaConfig` or `MistralConfig`; a `ValueError` names a size that it lacks."""
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        head_width = getattr(config, "head_dim", None) or hidden // heads
        return cls(
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


@dataclass(frozen=True)
class ModelShape:
    """A LLaVA: decoder, vision tower, and the linear layers of the projector between them (0 for "identity").

    ``crops`` per image, base view included: 1, or the most that an anyres model makes.
    """

    decoder: DecoderShape
    tower: TowerShape
    projector_layers: int
    crops: int = 1

    @classmethod
    def of(cls, config: Any, vision_config: Any) -> ModelShape:
        """From a LLaVA's configuration and its vision tower's.

        Raises
        ------
        ValueError
            Names a size that a configuration lacks, or an unknown projector.
        """
        tower = TowerShape.of(
            vision_config,
            getattr(config, "mm_vision_select_layer", -2),
            getattr(config, "mm_vision_select_feature", "patch"),
        )
        return cls(
            decoder=DecoderShape.of(config),
            tower=tower,
            projector_layers=_projector_layers(getattr(config, "mm_projector_type", "linear")),
            crops=_most_crops(config, vision_config.image_size),
        )

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of an image with all its crops; unpadding and newline tokens change it by a few per cent."""
        return self.crops * self.tower.outputs


def load_shape(model: str) -> ModelShape:
    """The shape of a model by its name in `SHAPES`, or of a checkpoint, of which only the configuration is read.

    Raises
    ------
    OSError
        If there is no such checkpoint.
    ValueError
        If its configuration is not that of a LLaVA on a Llama-like decoder.
    """
    if model in SHAPES:
        return SHAPES[model]
    from llava.model.builder import read_config, resolve_model_path

    path = resolve_model_path(model)
    config = SimpleNamespace(**read_config(path))
    tower = getattr(config, "mm_vision_tower", None)
    if not isinstance(tower, str):
        raise ValueError(f"{model} is no LLaVA: its configuration names no vision tower (mm_vision_tower)")
    try:
        return ModelShape.of(config, _vision_config(path, tower))
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None


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
_VICUNA_7B = DecoderShape(4096, 11008, layers=32, query_width=4096, key_width=4096, vocabulary=32000)
_VICUNA_13B = DecoderShape(5120, 13824, layers=40, query_width=5120, key_width=5120, vocabulary=32000)

SHAPES = {
    f"{generation}-{size}": ModelShape(decoder, TowerShape.of(_CLIP_L_336), projector_layers=2, crops=crops)
    for generation, crops in (("1.5", 1), ("1.6", 5))
    for size, decoder in (("7b", _VICUNA_7B), ("13b", _VICUNA_13B))
}
"""The published LLaVAs on Vicuna."""
