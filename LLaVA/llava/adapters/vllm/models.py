"""The classes that vLLM looks up, made when first asked for: one of `FAMILIES` each, named by its architecture."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from vllm.multimodal import MULTIMODAL_REGISTRY

from llava.adapters.vllm.families import FAMILIES
from llava.adapters.vllm.model import PrunedModel, PrunedMRopeModel
from llava.adapters.vllm.processor import ImagesOnly, PrunedProcessor


@functools.cache
def __getattr__(architecture: str) -> type:
    if architecture not in FAMILIES:
        raise AttributeError(f"no pruned {architecture}")
    family = FAMILIES[architecture]
    module = importlib.import_module(f"vllm.model_executor.models.{family.module}")
    whole = getattr(module, family.name or architecture)
    pruned = _extended(PrunedMRopeModel if family.mrope else PrunedModel, whole)
    pruned.family = family
    factories = whole._processor_factory

    def info(context: Any) -> Any:
        tower = context.get_hf_config().vision_config.model_type
        if tower == family.tower:
            raise ValueError(f"{architecture} with a vision tower of type {tower} is not pruned: unset BASELINE")
        kind = type(factories.info(context))
        return (_extended(ImagesOnly, kind) if family.mrope else kind)(context)

    def processor(info: Any, dummy_inputs: Any) -> Any:
        return _extended(PrunedProcessor, type(factories.processor(info, dummy_inputs)))(info, dummy_inputs)

    register = MULTIMODAL_REGISTRY.register_processor(processor, info=info, dummy_inputs=factories.dummy_inputs)
    return register(pruned)


def _extended(base: type, whole: type) -> Any:
    """vLLM's class with ours before it."""
    return type(f"Pruned{whole.__name__}", (base, whole), {"__module__": __name__})
