"""Models to measure: named shapes with random weights, llava-mini, or a checkpoint; and prompts for them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.flops import SHAPES, USUAL_TEXT

SYSTEM_PROMPT = 35
"""Tokens of Vicuna's system prompt, which stand before the picture."""

ANYRES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}

TINY_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 256,
}
TINY_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}

RANDOM = ("tiny", "1.5-7b", "1.5-13b", "1.6-7b")
"""Shapes that are built with random weights: the published ones, and one that a CPU runs in milliseconds."""


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts with a picture each.

    Attributes
    ----------
    input_ids : Tensor (B, T), int64
    images : Tensor (B, 3, H, W), or list of Tensor (crops, 3, H, W)
    image_sizes : list of (width, height)
    """

    input_ids: torch.Tensor
    images: torch.Tensor | list[torch.Tensor]
    image_sizes: list[tuple[int, int]]

    def arguments(self) -> dict[str, Any]:
        """For the model's ``forward`` or ``generate``."""
        return {"input_ids": self.input_ids, "images": self.images, "image_sizes": self.image_sizes}


def load(name: str, device: torch.device, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    """A model in eval mode.

    Parameters
    ----------
    name : str
        One of `RANDOM`, "llava-mini", a checkpoint folder or a hub id.
    device : torch.device
    dtype : torch.dtype
    attention : str
        sdpa, eager or flash_attention_2.
    """
    if name in RANDOM:
        return _random(name, device, dtype, attention)
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    _, model, _, _ = load_pretrained_model(
        name,
        None,
        get_model_name_from_path(name),
        device=str(device),
        dtype=dtype,
        attn_implementation=attention,
        multimodal=True,
    )
    return model


def _random(name: str, device: torch.device, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    from transformers import CLIPImageProcessor, CLIPVisionConfig

    from llava.model import LlavaConfig, LlavaLlamaForCausalLM

    decoder, tower = (TINY_DECODER, TINY_TOWER) if name == "tiny" else _published(name)
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
        torch.manual_seed(0)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                model = LlavaLlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(usual)
        model.get_vision_tower().mark_loaded()
    if hasattr(model.get_model(), "image_newline"):
        torch.nn.init.normal_(model.get_model().image_newline, std=decoder["hidden_size"] ** -0.5)
    # Random weights end no answer: every one has the length that was asked for.
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def _published(name: str) -> tuple[dict[str, int], dict[str, int]]:
    shape = SHAPES[name].decoder
    decoder = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 128,
        "vocab_size": shape.vocabulary,
    }
    tower = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    return decoder, tower


def prompts(model: torch.nn.Module, pictures: Sequence[int], questions: Sequence[int]) -> Prompts:
    """Prompts of a benchmark's length with random text and random pictures.

    Parameters
    ----------
    model
    pictures : sequence of int
        The number of each row's picture: the same number, the same picture.
    questions : sequence of int
        The number of each row's question.
    """
    weight = model.get_input_embeddings().weight
    rows = [_question(number, weight.shape[0]) for number in questions]
    drawn = {number: _picture(model, number) for number in dict.fromkeys(pictures)}
    images = [drawn[number].to(weight) for number in pictures]
    anyres = _is_anyres(model)
    side = model.get_vision_tower().config.image_size
    return Prompts(
        torch.stack(rows).to(weight.device),
        images if anyres else torch.stack(images),
        [(2 * side, 2 * side) if anyres else (side, side)] * len(images),
    )


def _question(number: int, vocabulary: int) -> torch.Tensor:
    """The system prompt, the picture's mark, a question: (T,)."""
    system, question = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + number)
    return torch.cat(
        [
            torch.randint(3, vocabulary, (SYSTEM_PROMPT,), generator=system),
            torch.tensor([IMAGE_TOKEN_INDEX]),
            torch.randint(3, vocabulary, (USUAL_TEXT - SYSTEM_PROMPT,), generator=question),
        ]
    )


def _picture(model: torch.nn.Module, number: int) -> torch.Tensor:
    """(3, H, W), or (5, 3, H, W) for an anyres model."""
    side = model.get_vision_tower().config.image_size
    return _drawn((5, 3, side, side) if _is_anyres(model) else (3, side, side), number)


@lru_cache(maxsize=1024)
def _drawn(shape: tuple[int, ...], number: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def _is_anyres(model: torch.nn.Module) -> bool:
    return getattr(model.config, "image_aspect_ratio", None) == "anyres"


@contextmanager
def replaced(owner: Any, name: str, wrap) -> Iterator[None]:
    """Inside the block ``owner.name`` is ``wrap`` of what it was."""
    before = getattr(owner, name)
    own = name in vars(owner)
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
