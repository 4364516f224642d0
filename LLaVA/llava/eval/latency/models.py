"""Models and methods to measure, and prompts for the models.

A model is a named shape with random weights, llava-mini, or a checkpoint: a LLaVA of this package, or a vision-language
model of transformers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from llava import command, hf
from llava.constants import IMAGE_TOKEN_INDEX
from llava.flops import SHAPES, USUAL_TEXT
from llava.flops.made_up import is_configuration, made_up_prompts, transformers_config
from llava.pruning import PruningConfig

SYSTEM_PROMPT = 35
"""Tokens of Vicuna's system prompt, which come before the image."""

ANYRES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}

TINY_DECODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
TINY_DECODER |= {"num_attention_heads": 4, "vocab_size": 256}
TINY_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 12}
TINY_TOWER |= {"num_attention_heads": 4, "image_size": 112, "patch_size": 14}
CLIP_L_336 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP_L_336 |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}

RANDOM = ("tiny", "1.5-7b", "1.5-13b", "1.6-7b")
"""Shapes that are built with random weights: the published ones, and one that a CPU runs in milliseconds."""
UNPRUNED, PUBLISHED = "unpruned", "published"
"""Names of no method, and of OTPrune's published code."""


def read_methods(texts: Sequence[str], ratio: float) -> dict[str, PruningConfig]:
    """Label -> configuration, as `llava.command.read_methods` reads them.

    ``NAME@LAYER`` is ``NAME:layer=LAYER``.
    """
    found = {}
    for text in texts:
        name, at, layer = text.partition("@")
        if at and not layer.isdecimal():
            raise ValueError(f"a method is NAME or NAME@LAYER, not {text!r}")
        stated = "otprune:compat=1" if text == PUBLISHED else f"{name}:layer={layer}" if at else name
        [found[text]] = command.read_methods(stated, ratio, {}).values()
    return found


def load(name: str, device: torch.device, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    """A model in eval mode: one of `RANDOM`, a family of transformers, "llava-mini", a checkpoint folder or a hub id.

    ``attention`` is sdpa, eager or flash_attention_2.
    """
    if name in RANDOM:
        return _random(name, device, dtype, attention)
    other = transformers_config(name)
    if other is not None:
        return _of_transformers(name, other, device, dtype, attention)
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    settings = {"device": str(device), "dtype": dtype, "attn_implementation": attention}
    return load_pretrained_model(name, None, get_model_name_from_path(name), **settings, multimodal=True)[1]


def _of_transformers(name: str, config: Any, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    """A checkpoint's model; of a family or a published shape, one with random weights."""
    from transformers import AutoModelForImageTextToText

    settings = {"dtype": dtype, "attn_implementation": attention}
    if not is_configuration(name):
        return AutoModelForImageTextToText.from_pretrained(hf.path_of(name), **settings).to(device).eval()
    with _random_weights(device, dtype):
        model = AutoModelForImageTextToText.from_config(config, **settings)
    return _endless(model.to(device))


@contextmanager
def _random_weights(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Weights created inside the block are the same every time, of a dtype, and on the device."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(usual)


def _endless(model: Any) -> Any:
    """In eval mode, with answers that never end early: every one has the requested length."""
    model.generation_config.eos_token_id = None
    return model.eval()


def _random(name: str, device: torch.device, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    from transformers import CLIPImageProcessor, CLIPVisionConfig

    from llava.model import LlavaConfig, LlavaLlamaForCausalLM

    decoder, tower = (TINY_DECODER, TINY_TOWER) if name == "tiny" else (_published(name), CLIP_L_336)
    side = tower["image_size"]
    with tempfile.TemporaryDirectory() as folder:
        # The tower is built from a folder, as it is for every checkpoint.
        CLIPVisionConfig(**tower).save_pretrained(folder)
        size = {"shortest_edge": side}, {"height": side, "width": side}
        CLIPImageProcessor(size=size[0], crop_size=size[1]).save_pretrained(folder)
        config = LlavaConfig(
            **decoder,
            **(ANYRES if name.startswith("1.6") else {}),
            mm_vision_tower=folder,
            mm_hidden_size=tower["hidden_size"],
            mm_vision_select_layer=-2,
            mm_projector_type="mlp2x_gelu",
            max_position_embeddings=4096,
            pad_token_id=0,
            attn_implementation=attention,
        )
        with _random_weights(device, dtype):
            model = LlavaLlamaForCausalLM(config)
        model.get_vision_tower().mark_loaded()
    if hasattr(model.get_model(), "image_newline"):
        torch.nn.init.normal_(model.get_model().image_newline, std=decoder["hidden_size"] ** -0.5)
    return _endless(model.to(device))


def _published(name: str) -> dict[str, int]:
    shape = SHAPES[name].decoder
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 128,
        "vocab_size": shape.vocabulary,
    }


def is_llava(model: torch.nn.Module) -> bool:
    """Whether it is this package's own, and none of transformers."""
    return hasattr(model, "set_pruning")


def set_pruning(model: torch.nn.Module, config: PruningConfig | None) -> None:
    """Prune from now on with a method, or not at all."""
    if is_llava(model):
        model.set_pruning(config)
    else:
        from llava.adapters.transformers import set_pruning as set_on_transformers

        set_on_transformers(model, config)


def tokens_per_layer(model: torch.nn.Module, asked: dict[str, Any]) -> list[list[int]]:
    """The visual tokens of each image in every decoder layer, in the latest call, which answered these prompts."""
    if is_llava(model):
        return model.visual_tokens_per_layer
    from llava.adapters.transformers import active_session

    session = active_session(model)
    if session is not None:
        return session.visual_tokens_per_layer
    marks = (asked["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    return [[count] * model.config.get_text_config().num_hidden_layers for count in marks]


def prompts(model: torch.nn.Module, images: Sequence[int], questions: Sequence[int]) -> dict[str, Any]:
    """Prompts of a benchmark's length with random text and random images, for the model's ``forward`` or ``generate``.

    Rows with the same number have the same image, or the same question. For a LLaVA: "input_ids" (B, T), int64,
    "images" (B, 3, H, W), or a list of (crops, 3, H, W), and "image_sizes"; otherwise what its processor gives.
    """
    weight = model.get_input_embeddings().weight
    if not is_llava(model):
        # Special tokens have high ids.
        rows = [_question(number, min(weight.shape[0], model.config.image_token_id)).tolist() for number in questions]
        text = [(row[:SYSTEM_PROMPT], row[SYSTEM_PROMPT + 1 :]) for row in rows]
        return made_up_prompts(model, text, images)
    anyres = getattr(model.config, "image_aspect_ratio", None) == "anyres"
    side = model.get_vision_tower().config.image_size
    pixels = [_random_image((5, 3, side, side) if anyres else (3, side, side), number).to(weight) for number in images]
    return {
        "input_ids": torch.stack([_question(number, weight.shape[0]) for number in questions]).to(weight.device),
        "images": pixels if anyres else torch.stack(pixels),
        "image_sizes": [(2 * side, 2 * side) if anyres else (side, side)] * len(pixels),
    }


def _question(number: int, vocabulary: int) -> torch.Tensor:
    """The system prompt, the image's mark, a question: (T,)."""
    system, question = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + number)
    return torch.cat(
        [
            torch.randint(3, vocabulary, (SYSTEM_PROMPT,), generator=system),
            torch.tensor([IMAGE_TOKEN_INDEX]),
            torch.randint(3, vocabulary, (USUAL_TEXT - SYSTEM_PROMPT,), generator=question),
        ]
    )


@lru_cache(maxsize=1024)
def _random_image(shape: tuple[int, ...], number: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))
