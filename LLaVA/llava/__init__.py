"""LLaVA with visual token pruning."""

from __future__ import annotations

__version__ = "0.2.0"


def __getattr__(name: str):
    """Import the model class on first use, so that ``import llava`` stays light."""
    if name == "LlavaLlamaForCausalLM":
        from llava.model import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module 'llava' has no attribute {name!r}")
