"""Which of lmms-eval's wrappers evaluates a model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava.model.checkpoint import is_of_transformers

WRAPPERS = (
    "gemma3",
    "glm4v",
    "huggingface",
    "internvl_hf",
    "llava_hf",
    "mistral3_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
)
"""Ids of wrappers that hold a model of transformers in ``self.model`` and call its ``generate``."""
_OF_FAMILY = {
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "mistral3": "mistral3_vl",
}


def wrapper_of(config: Mapping[str, Any]) -> str | None:
    """The id of the wrapper for a checkpoint with this config.json; None for a checkpoint in LLaVA's own format."""
    if not is_of_transformers(config):
        return None
    family = str(config.get("model_type"))
    name = _OF_FAMILY.get(family, family)
    return name if name in WRAPPERS else "huggingface"
