"""Tiny random vision-language models of transformers, one a family, and prompts for them.

``tiny(name)`` -> `TinyModel`; ``tiny(name).inputs([[3, Picture(0), 4], ...])`` -> arguments of forward and generate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf

CAN_BE_PRUNED = "mm_encoder_outputs" in inspect.signature(tf.LlavaForConditionalGeneration.forward).parameters
can_be_pruned = pytest.mark.skipif(not CAN_BE_PRUNED, reason="transformers 5.18 encodes images apart")
"""For tests that prune models of transformers, which older ones cannot."""

PAD, IMAGE, VIDEO, START, END, BREAK, SEPARATOR, VOCABULARY = 0, 90, 91, 92, 93, 94, 95, 100
SPECIAL = [IMAGE, VIDEO, START, END, BREAK, SEPARATOR]
"""Not to be generated: several models look for them among their ids."""


@dataclass(frozen=True)
class Picture:
    """Random pixels; ``size`` is one of four that every family has."""

    seed: int
    size: int = 0

    def pixels(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + self.seed))


Row = list["int | Picture"]


@dataclass(frozen=True)
class TinyModel:
    """A model, how a picture is spelled in a prompt, and how its pixels are handed over."""

    model: tf.PreTrainedModel
    placeholders: Callable[[Picture], list[int]]
    pixels: Callable[[list[list[Picture]]], dict[str, torch.Tensor]]
    types: str | None = None
    image_type: int = 1

    def inputs(self, rows: list[Row], side: str = "left") -> dict[str, torch.Tensor]:
        ids = [
            [i for part in row for i in (self.placeholders(part) if isinstance(part, Picture) else [part])]
            for row in rows
        ]
        longest = max(map(len, ids))

        def padded(values: list[list[int]]) -> torch.Tensor:
            fills = [[0] * (longest - len(row)) for row in values]
            return torch.tensor([f + row if side == "left" else row + f for f, row in zip(fills, values, strict=True)])

        found = {"input_ids": padded(ids), "attention_mask": padded([[1] * len(row) for row in ids])}
        if self.types:
            found[self.types] = (found["input_ids"] == IMAGE).long() * self.image_type
        pictures = [[part for part in row if isinstance(part, Picture)] for row in rows]
        return found | self.pixels(pictures) if any(pictures) else found


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | more


_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_GRID_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "out_hidden_size": 32,
}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_GRID_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": BREAK,
    "video_end_token_id": SEPARATOR,
}
_PINPOINTS = [[30, 60], [60, 30], [60, 60], [30, 90]]
_ANYRES_SIZES = [(60, 60), (30, 60), (50, 30), (20, 60)]  # (height, width)
_GRIDS = [(8, 8), (6, 10), (4, 12), (8, 6)]
_TILES = [1, 3, 2, 1]
_PIXTRAL_SIZES = [(32, 32), (24, 40), (16, 48), (32, 24)]


def _clip() -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**_TOWER, image_size=30, patch_size=6, projection_dim=16)


def _siglip(size: int, patch: int) -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(**_TOWER, image_size=size, patch_size=patch, vision_use_head=False)


def _pixtral() -> tf.PixtralVisionConfig:
    return tf.PixtralVisionConfig(**_TOWER, image_size=48, patch_size=4, head_dim=8)


def _flat(rows: list[list[Picture]]) -> list[Picture]:
    return [picture for row in rows for picture in row]


def _squares(side: int) -> Callable[[list[list[Picture]]], dict[str, torch.Tensor]]:
    return lambda rows: {"pixel_values": torch.stack([p.pixels(3, side, side) for p in _flat(rows)])}


def _tiles(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.cat([p.pixels(_TILES[p.size], 3, 32, 32) for p in _flat(rows)])}


def _tiles_a_prompt(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
    counts = [sum(_TILES[p.size] for p in row) for row in rows]
    pixels = torch.zeros(len(rows), max(counts), 3, 32, 32)
    for own, row, count in zip(pixels, rows, counts, strict=True):
        if row:
            own[:count] = torch.cat([p.pixels(_TILES[p.size], 3, 32, 32) for p in row])
    return {"pixel_values": pixels}


def _grids(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
    sizes = [_GRIDS[p.size] for p in _flat(rows)]
    return {
        "pixel_values": torch.cat([p.pixels(h * w, 96) for p, (h, w) in zip(_flat(rows), sizes, strict=True)]),
        "image_grid_thw": torch.tensor([(1, *size) for size in sizes]),
    }


def _grid_tokens(picture: Picture) -> list[int]:
    rows, columns = _GRIDS[picture.size]
    return [START, *[IMAGE] * (rows * columns // 4), END]


def _crops(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    pictures = _flat(rows)
    sizes = torch.tensor([_ANYRES_SIZES[p.size] for p in pictures])
    counts = [image_size_to_num_patches(size, _PINPOINTS, 30) for size in sizes]
    pixels = torch.zeros(len(pictures), max(counts), 3, 30, 30)
    for own, picture, count in zip(pixels, pictures, counts, strict=True):
        own[:count] = picture.pixels(count, 3, 30, 30)
    return {"pixel_values": pixels, "image_sizes": sizes}


def _as_many_as_encoded(model: tf.PreTrainedModel, pixels: Callable) -> Callable[[Picture], list[int]]:
    def placeholders(picture: Picture) -> list[int]:
        with torch.no_grad():
            features = model.model.get_image_features(**pixels([[picture]]), return_dict=True)
        return [IMAGE] * len(features.pooler_output[0])

    return placeholders


def _canvas(rows: list[list[Picture]]) -> dict[str, torch.Tensor]:
    pictures, sizes = _flat(rows), [_PIXTRAL_SIZES[p.size] for p in _flat(rows)]
    pixels = torch.zeros(len(pictures), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    for own, picture, (height, width) in zip(pixels, pictures, sizes, strict=True):
        own[:, :height, :width] = picture.pixels(3, height, width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _rows_with_breaks(cell: int) -> Callable[[Picture], list[int]]:
    def placeholders(picture: Picture) -> list[int]:
        height, width = _PIXTRAL_SIZES[picture.size]
        return [*([*[IMAGE] * (width // cell), BREAK] * (height // cell))[:-1], END]

    return placeholders


def _tagged_tiles(picture: Picture) -> list[int]:
    return [START, *[BREAK, *[IMAGE] * 16] * _TILES[picture.size], END]


def _built(kind: type, config: tf.PreTrainedConfig, attention: str) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or name.endswith(("class_embedding", "image_newline")):
                parameter.normal_(0, 0.5 if parameter.ndim == 1 or "embed" in name else 0.25)
            elif "norm" not in name.lower() and "bias" in name:
                parameter.normal_(0, 0.05)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def _llava(attention: str) -> TinyModel:
    config = tf.LlavaConfig(
        vision_config=_clip(),
        text_config=tf.LlamaConfig(**_text()),
        image_token_index=IMAGE,
        image_seq_length=25,
        vision_feature_layer=-2,
    )
    model = _built(tf.LlavaForConditionalGeneration, config, attention)
    return TinyModel(model, lambda picture: [IMAGE] * 25, _squares(30))


def _vipllava(attention: str) -> TinyModel:
    config = tf.VipLlavaConfig(
        vision_config=_clip(),
        text_config=tf.LlamaConfig(**_text()),
        image_token_index=IMAGE,
        image_seq_length=25,
        vision_feature_layers=[-1, -2],
    )
    model = _built(tf.VipLlavaForConditionalGeneration, config, attention)
    return TinyModel(model, lambda picture: [IMAGE] * 25, _squares(30))


def _llava_next(attention: str) -> TinyModel:
    config = tf.LlavaNextConfig(
        vision_config=_clip(),
        text_config=tf.MistralConfig(**_text(sliding_window=None)),
        image_token_index=IMAGE,
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-2,
    )
    model = _built(tf.LlavaNextForConditionalGeneration, config, attention)
    return TinyModel(model, _as_many_as_encoded(model, _crops), _crops)


def _llava_onevision(attention: str) -> TinyModel:
    config = tf.LlavaOnevisionConfig(
        vision_config=_siglip(30, 6),
        text_config=tf.Qwen2Config(**_text()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = _built(tf.LlavaOnevisionForConditionalGeneration, config, attention)
    return TinyModel(model, _as_many_as_encoded(model, _crops), _crops)


def _qwen2_vl(attention: str) -> TinyModel:
    tower = {k: v for k, v in _GRID_TOWER.items() if k not in ("out_hidden_size", "intermediate_size")}
    config = tf.Qwen2VLConfig(
        vision_config=tower | {"embed_dim": 32, "mlp_ratio": 2},
        text_config=_text(rope_parameters=_MROPE),
        **_GRID_IDS,
    )
    model = _built(tf.Qwen2VLForConditionalGeneration, config, attention)
    return TinyModel(model, _grid_tokens, _grids, types="mm_token_type_ids")


def _qwen2_5_vl(attention: str) -> TinyModel:
    config = tf.Qwen2_5_VLConfig(
        vision_config=_GRID_TOWER | {"window_size": 16, "fullatt_block_indexes": [2]},
        text_config=_text(rope_parameters=_MROPE),
        **_GRID_IDS,
    )
    model = _built(tf.Qwen2_5_VLForConditionalGeneration, config, attention)
    return TinyModel(model, _grid_tokens, _grids, types="mm_token_type_ids")


_DEEP = {"depth": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
_DEEP_TEXT = {"rope_parameters": _MROPE | {"mrope_interleaved": True}, "head_dim": 8, "num_hidden_layers": 5}


def _qwen3_vl(attention: str) -> TinyModel:
    config = tf.Qwen3VLConfig(vision_config=_GRID_TOWER | _DEEP, text_config=_text(**_DEEP_TEXT), **_GRID_IDS)
    model = _built(tf.Qwen3VLForConditionalGeneration, config, attention)
    return TinyModel(model, _grid_tokens, _grids, types="mm_token_type_ids")


def _qwen3_vl_moe(attention: str) -> TinyModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = tf.Qwen3VLMoeConfig(
        vision_config=_GRID_TOWER | _DEEP, text_config=_text(**_DEEP_TEXT, **experts), **_GRID_IDS
    )
    model = _built(tf.Qwen3VLMoeForConditionalGeneration, config, attention)
    return TinyModel(model, _grid_tokens, _grids, types="mm_token_type_ids")


def _qwen3_5(attention: str) -> TinyModel:
    config = tf.Qwen3_5Config(
        vision_config=_GRID_TOWER | {"num_position_embeddings": 64},
        text_config=_text(
            rope_parameters=_MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
            head_dim=8,
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        **_GRID_IDS,
    )
    model = _built(tf.Qwen3_5ForConditionalGeneration, config, attention)
    return TinyModel(model, _grid_tokens, _grids, types="mm_token_type_ids")


def _glm4v(attention: str) -> TinyModel:
    config = tf.Glm4vConfig(
        vision_config=_GRID_TOWER | {"image_size": 32},
        text_config=_text(rope_parameters=_MROPE | {"partial_rotary_factor": 1.0}),
        **_GLM_IDS,
    )
    model = _built(tf.Glm4vForConditionalGeneration, config, attention)
    return TinyModel(model, _grid_tokens, _grids, types="mm_token_type_ids")


def _glm46v(attention: str) -> TinyModel:
    text = _text(rope_parameters=_MROPE | {"partial_rotary_factor": 1.0})
    config = tf.Glm46VConfig(
        vision_config=_GRID_TOWER | {"image_size": 32, "model_type": "glm4v_vision"},
        text_config=text | {"model_type": "glm4v_text"},
        **_GLM_IDS,
    )
    model = _built(tf.Glm46VForConditionalGeneration, config, attention)
    return TinyModel(model, _grid_tokens, _grids, types="mm_token_type_ids")


def _glm4v_moe(attention: str) -> TinyModel:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = tf.Glm4vMoeConfig(
        vision_config=_GRID_TOWER | {"image_size": 32},
        text_config=_text(rope_parameters=_MROPE | {"partial_rotary_factor": 1.0}, **experts),
        **_GLM_IDS,
    )
    model = _built(tf.Glm4vMoeForConditionalGeneration, config, attention)
    return TinyModel(model, _grid_tokens, _grids, types="mm_token_type_ids")


def _internvl(attention: str) -> TinyModel:
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**_TOWER, image_size=[32, 32], patch_size=[4, 4]),
        text_config=tf.Qwen2Config(**_text()),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    model = _built(tf.InternVLForConditionalGeneration, config, attention)
    return TinyModel(model, lambda picture: [START, *[IMAGE] * (16 * _TILES[picture.size]), END], _tiles)


def _aya_vision(attention: str) -> TinyModel:
    config = tf.AyaVisionConfig(
        vision_config=_siglip(32, 4),
        text_config=tf.Cohere2Config(**_text(sliding_window=16)),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    )
    return TinyModel(_built(tf.AyaVisionForConditionalGeneration, config, attention), _tagged_tiles, _tiles)


def _cohere2_vision(attention: str) -> TinyModel:
    config = tf.Cohere2VisionConfig(
        vision_config=_siglip(32, 4),
        text_config=tf.Cohere2Config(**_text(sliding_window=16)),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=48,
    )
    model = _built(tf.Cohere2VisionForConditionalGeneration, config, attention)
    return TinyModel(model, lambda picture: [START, *[IMAGE] * (16 * _TILES[picture.size]), END], _tiles)


def _idefics(config: type, model: type, vision: type, attention: str) -> TinyModel:
    made = config(
        vision_config=vision(**_TOWER, image_size=32, patch_size=4),
        text_config=tf.LlamaConfig(**_text()),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return TinyModel(_built(model, made, attention), _tagged_tiles, _tiles_a_prompt)


def _idefics3(attention: str) -> TinyModel:
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    return _idefics(tf.Idefics3Config, tf.Idefics3ForConditionalGeneration, Idefics3VisionConfig, attention)


def _smolvlm(attention: str) -> TinyModel:
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    return _idefics(tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration, SmolVLMVisionConfig, attention)


def _gemma3(attention: str) -> TinyModel:
    text = tf.Gemma3TextConfig(
        **_text(
            head_dim=8,
            sliding_window=12,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    )
    config = tf.Gemma3Config(
        vision_config=_siglip(32, 4),
        text_config=text,
        mm_tokens_per_image=16,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=IMAGE,
    )
    model = _built(tf.Gemma3ForConditionalGeneration, config, attention)
    return TinyModel(model, lambda picture: [START, *[IMAGE] * 16, END], _squares(32), types="token_type_ids")


def _paligemma(attention: str) -> TinyModel:
    config = tf.PaliGemmaConfig(
        vision_config=_siglip(24, 4),
        text_config=tf.GemmaConfig(**_text(head_dim=8)),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    model = _built(tf.PaliGemmaForConditionalGeneration, config, attention)
    # Type 0 is the prefix: images and text alike, read in both directions.
    return TinyModel(model, lambda picture: [IMAGE] * 36, _squares(24), types="token_type_ids", image_type=0)


def _mistral3(attention: str) -> TinyModel:
    config = tf.Mistral3Config(
        vision_config=_pixtral(),
        text_config=tf.MistralConfig(**_text(head_dim=8, sliding_window=None)),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return TinyModel(_built(tf.Mistral3ForConditionalGeneration, config, attention), _rows_with_breaks(8), _canvas)


def _pixtral_llava(attention: str) -> TinyModel:
    config = tf.LlavaConfig(
        vision_config=_pixtral(),
        text_config=tf.MistralConfig(**_text(head_dim=8, sliding_window=None)),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return TinyModel(_built(tf.LlavaForConditionalGeneration, config, attention), _rows_with_breaks(4), _canvas)


def _ovis2(attention: str) -> TinyModel:
    tower = _TOWER | {"image_size": 32, "patch_size": 4, "vocab_size": 32, "hidden_stride": 2}
    config = tf.Ovis2Config(
        vision_config=tower | {"num_visual_indicator_tokens": 5},
        text_config=tf.Qwen2Config(**_text()),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END, BREAK, SEPARATOR, VIDEO],
        hidden_size=32,
    )
    model = _built(tf.Ovis2ForConditionalGeneration, config, attention)
    count = _as_many_as_encoded(model, _squares(32))
    return TinyModel(model, lambda picture: [START, *count(picture), END], _squares(32))


TINY: dict[str, Callable[[str], TinyModel]] = {
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
    "gemma3": _gemma3,
    "glm46v": _glm46v,
    "glm4v": _glm4v,
    "glm4v_moe": _glm4v_moe,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "mistral3": _mistral3,
    "ovis2": _ovis2,
    "paligemma": _paligemma,
    "pixtral": _pixtral_llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_5": _qwen3_5,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "smolvlm": _smolvlm,
    "vipllava": _vipllava,
}


@cache
def tiny(name: str, attention: str = "sdpa") -> TinyModel:
    """The tiny model of a family."""
    return TINY[name](attention)
