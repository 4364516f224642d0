"""LLaVA on a Llama decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.language_model.decoder import DroppingDecoder
from llava.model.language_model.generation import LlavaGenerationMixin
from llava.model.llava_arch import LlavaMetaModel
from llava.pruning.config import PruningConfig


class LlavaConfig(LlamaConfig):
    """A Llama configuration that also carries the ``mm_*`` keys of a LLaVA checkpoint."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, DroppingDecoder, LlamaModel):
    """The decoder stack with vision tower and projector."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaGenerationMixin, LlamaForCausalLM):
    """LLaVA of the first generation, 1.5, and 1.6 on Vicuna."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig, tower_source: Mapping[str, Any] | None = None):
        pruning = PruningConfig.from_env()
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config, **(tower_source or {}))
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.set_pruning(pruning)
        self.post_init()


AutoConfig.register(LlavaConfig.model_type, LlavaConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM, exist_ok=True)
