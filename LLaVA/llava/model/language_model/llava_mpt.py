"""LLaVA on MPT: the names exist, and refuse to work."""

from __future__ import annotations

from transformers import AutoConfig, MptConfig


class LlavaMptConfig(MptConfig):
    """Configuration of LLaVA on MPT, readable so that a checkpoint can be recognised."""

    model_type = "llava_mpt"


class LlavaMptModel:
    """LLaVA on MPT cannot run: in the original, too, its forward pass fails with images."""

    config_class = LlavaMptConfig

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("LLaVA on MPT is not supported; use a LLaVA on Llama or Mistral")

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()


class LlavaMptForCausalLM(LlavaMptModel):
    """The same with a language modelling head."""


AutoConfig.register(LlavaMptConfig.model_type, LlavaMptConfig, exist_ok=True)
