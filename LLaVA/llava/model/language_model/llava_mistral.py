"""LLaVA on a Mistral decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel

from llava.model.language_model.decoder import DroppingDecoder
from llava.model.language_model.generation import LlavaGenerationMixin
from llava.model.llava_arch import LlavaMetaModel
from llava.pruning.config import PruningConfig


class LlavaMistralConfig(MistralConfig):
    """A Mistral configuration that also carries the ``mm_*`` keys of a LLaVA checkpoint."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, DroppingDecoder, MistralModel):
    """The decoder stack with vision tower and projector."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaGenerationMixin, MistralForCausalLM):
    """LLaVA-1.6 on Mistral."""

    config_class = LlavaMistralConfig

    def __init__(self, config: LlavaMistralConfig, tower_source: Mapping[str, Any] | None = None):
        pruning = PruningConfig.from_env()
        super(MistralForCausalLM, self).__init__(config)
        self.model = LlavaMistralModel(config, **(tower_source or {}))
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.set_pruning(pruning)
        self.post_init()


AutoConfig.register(LlavaMistralConfig.model_type, LlavaMistralConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM, exist_ok=True)
