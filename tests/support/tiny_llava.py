"""A random LLaVA small enough to run hundreds of times: 16 or 576 visual tokens, four decoder layers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralConfig, LlavaMistralForCausalLM

VOCABULARY = 200
SIDE = 56


def save_tower(folder: Path, image_size: int = SIDE) -> str:
    """Write a random CLIP tower with ``(image_size / 14)^2`` patches."""
    torch.manual_seed(11)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
        initializer_factor=3.0,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    ).save_pretrained(folder)
    return str(folder)


def build(tower: str, family: str = "llama", **overrides) -> torch.nn.Module:
    """A float32 model in eval mode on a tower folder."""
    torch.manual_seed(12)
    config_class, model_class = {
        "llama": (LlavaConfig, LlavaLlamaForCausalLM),
        "mistral": (LlavaMistralConfig, LlavaMistralForCausalLM),
    }[family]
    settings = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "mm_vision_tower": tower,
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
    }
    if family == "mistral":
        settings["sliding_window"] = None
    config = config_class(**(settings | overrides))
    model = model_class(config)
    model.get_vision_tower().load_model()
    if hasattr(model.model, "image_newline"):
        torch.nn.init.normal_(model.model.image_newline)
    model.generation_config.eos_token_id = None
    return model.eval()


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random normalised pixels (*shape, 3, 56, 56)."""
    return torch.randn(*shape, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def prompt(*pieces: int, seed: int = 0) -> torch.Tensor:
    """A row of ids: text runs of the given lengths with an image mark between every two."""
    generator = torch.Generator().manual_seed(seed)
    ids = [1]
    for number, length in enumerate(pieces):
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
        ids += torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
    return torch.tensor(ids)


def pad_rows(rows: list[torch.Tensor], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) padded with 0, and the mask."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, True
    return ids, mask
