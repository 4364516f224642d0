"""Folders with tiny random vision-language models as engines load them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llava.serve.export_hf import published_name

SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
]
TEMPLATE = (
    "{{{{ bos_token }}}}{{% for message in messages %}}{{% if message.content is string %}}{{{{ message.content }}}}"
    "{{% else %}}{{% for part in message.content %}}{{% if part.type == 'text' %}}{{{{ part.text }}}}"
    "{{% elif part.type == 'video' %}}<|vision_start|><|video_pad|><|vision_end|>{{% else %}}{image}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}>{{% endif %}}"
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
GRID_TOWER = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Bytes, and what stands for images."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(SPECIAL + alphabet)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={  # by these names Qwen's and InternVL's processors ask for them
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
    )
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    return fast


def checkpoint(name: str, folder: Path) -> Path:
    """Write the tiny model of a family; the same folder for the same name, weights and all."""
    words = tokenizer()
    model, make_processor, image = FAMILIES[name](words)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12, generator=generator)
    model.generation_config = tf.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    weights = model.state_dict()
    if "llava" in name:
        weights = {published_name(weight): value for weight, value in weights.items()}
    model.save_pretrained(folder, state_dict=weights, save_original_format="llava" not in name)
    make_processor(words, TEMPLATE.format(image=image)).save_pretrained(folder)
    return folder


def _text(words: tf.PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return TEXT | {"vocab_size": len(words)} | more


def _clip_pixels() -> dict[str, Any]:
    return {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}


def _clip() -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**TOWER, image_size=56, patch_size=14, projection_dim=16)


def _llava(words: tf.PreTrainedTokenizerFast) -> tuple[Any, Callable, str]:
    config = tf.LlavaConfig(
        vision_config=_clip(),
        text_config=tf.LlamaConfig(**_text(words)),
        image_token_index=words.convert_tokens_to_ids("<|image_pad|>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )

    def processor(words: Any, template: str) -> Any:
        images = tf.CLIPImageProcessor(**_clip_pixels())
        return tf.LlavaProcessor(images, words, 14, "default", template, num_additional_image_tokens=1)

    return tf.LlavaForConditionalGeneration(config), processor, "<|image_pad|>"


def _llava_next(words: tf.PreTrainedTokenizerFast) -> tuple[Any, Callable, str]:
    config = tf.LlavaNextConfig(
        vision_config=_clip(),
        text_config=tf.MistralConfig(**_text(words, sliding_window=None)),
        image_token_index=words.convert_tokens_to_ids("<|image_pad|>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )

    def processor(words: Any, template: str) -> Any:
        images = tf.LlavaNextImageProcessor(**_clip_pixels(), image_grid_pinpoints=PINPOINTS)
        return tf.LlavaNextProcessor(images, words, 14, "default", template, num_additional_image_tokens=1)

    return tf.LlavaNextForConditionalGeneration(config), processor, "<|image_pad|>"


def _llava_onevision(words: tf.PreTrainedTokenizerFast) -> tuple[Any, Callable, str]:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**TOWER, image_size=56, patch_size=14, vision_use_head=False),
        text_config=tf.Qwen2Config(**_text(words)),
        image_token_index=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_index=words.convert_tokens_to_ids("<|video_pad|>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )

    def processor(words: Any, template: str) -> Any:
        size = {"height": 56, "width": 56}
        return tf.LlavaOnevisionProcessor(
            tf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
            words,
            tf.LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=template,
            video_token="<|video_pad|>",
            vision_aspect_ratio="anyres_max_9",
        )

    return tf.LlavaOnevisionForConditionalGeneration(config), processor, "<|image_pad|>"


def _qwen_ids(words: tf.PreTrainedTokenizerFast) -> dict[str, Any]:
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    names |= {"vision_end": "<|vision_end|>"}
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in names.items()}
    return ids | {"tie_word_embeddings": False}


def _qwen_processor(kind: type, patch: int) -> Callable:
    def processor(words: Any, template: str) -> Any:
        pixels = {"patch_size": patch, "size": {"shortest_edge": 56 * 56, "longest_edge": 168 * 168}}
        if kind is tf.Qwen3VLProcessor:
            videos = tf.Qwen3VLVideoProcessor(patch_size=patch)
        else:
            videos = tf.Qwen2VLVideoProcessor(patch_size=patch)
        return kind(tf.Qwen2VLImageProcessor(**pixels), words, videos, chat_template=template)

    return processor


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen2_5_vl(words: tf.PreTrainedTokenizerFast) -> tuple[Any, Callable, str]:
    config = tf.Qwen2_5_VLConfig(
        text_config=_text(words, rope_parameters=MROPE),
        vision_config=GRID_TOWER | {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [2]},
        **_qwen_ids(words),
    )
    processor = _qwen_processor(tf.Qwen2_5_VLProcessor, 14)
    return tf.Qwen2_5_VLForConditionalGeneration(config), processor, _QWEN_IMAGE


def _qwen3_vl(words: tf.PreTrainedTokenizerFast) -> tuple[Any, Callable, str]:
    config = tf.Qwen3VLConfig(
        text_config=_text(words, rope_parameters=MROPE | {"mrope_interleaved": True}),
        vision_config=GRID_TOWER
        | {"patch_size": 14, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        **_qwen_ids(words),
    )
    processor = _qwen_processor(tf.Qwen3VLProcessor, 14)
    return tf.Qwen3VLForConditionalGeneration(config), processor, _QWEN_IMAGE


def _internvl(words: tf.PreTrainedTokenizerFast) -> tuple[Any, Callable, str]:
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**TOWER, image_size=[56, 56], patch_size=[7, 7]),
        text_config=tf.Qwen2Config(**_text(words)),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )

    def processor(words: Any, template: str) -> Any:
        images = tf.GotOcr2ImageProcessor(
            size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
        )
        videos = tf.InternVLVideoProcessor(size={"height": 56, "width": 56})
        return tf.InternVLProcessor(images, words, videos, image_seq_length=16, chat_template=template)

    return tf.InternVLForConditionalGeneration(config), processor, "<IMG_CONTEXT>"


FAMILIES = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
}
"""Name -> function from a tokenizer to (model, tokenizer and chat template -> processor, what spells an image)."""
