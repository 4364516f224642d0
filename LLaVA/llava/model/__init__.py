"""Model classes of LLaVA, imported when first used."""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "LlavaConfig": "llava_llama",
    "LlavaLlamaForCausalLM": "llava_llama",
    "LlavaMistralConfig": "llava_mistral",
    "LlavaMistralForCausalLM": "llava_mistral",
    "LlavaMptConfig": "llava_mpt",
    "LlavaMptForCausalLM": "llava_mpt",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'llava.model' has no attribute {name!r}")
    return getattr(import_module(f"llava.model.language_model.{_HOMES[name]}"), name)
