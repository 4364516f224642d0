"""The part in the API server: k placeholders per image in the prompt, and the ratio beside the image's pixels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems
from vllm.multimodal.processing import PromptUpdateDetails

from llava.adapters.vllm.families import Mixin
from llava.adapters.vllm.placeholders import shortened
from llava.adapters.vllm.switch import OVERRIDE, RATIO, configured, ratio_of, without_ratio
from llava.pruning import PruningConfig


def config_of(model_config: Any) -> PruningConfig:
    """The configuration for a model of vLLM."""
    return resolved(configured(getattr(model_config.hf_config, OVERRIDE, None)), model_config)


def resolved(config: PruningConfig, model_config: Any) -> PruningConfig:
    """A configuration with the options spelled out that depend on a model of vLLM."""
    has_cls = model_config.hf_config.vision_config.model_type.startswith("clip")
    return config.for_width(model_config.hf_text_config.hidden_size).for_encoder(has_cls)


class ImagesOnly(Mixin):
    """Stands before the ``ProcessingInfo`` of a model whose videos would need positions of their own."""

    @functools.cached_property
    def allowed_mm_limits(self) -> dict[str, int]:
        return {**super().allowed_mm_limits, "video": 0}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items:
            raise ValueError("videos are not served while images are pruned")
        super().validate_num_items(modality, num_items)


class PrunedProcessor(Mixin):
    """Stands before a processor of vLLM among the bases of a class."""

    def __init__(self, info: Any, *args: Any, **kwargs: Any):
        if RATIO in (info.ctx.get_mm_config().mm_processor_kwargs or {}):
            raise ValueError(f"{RATIO} is for requests; the server's own ratio is SUBSET_RATIO")
        super().__init__(info, *args, **kwargs)

    @functools.cached_property
    def pruning(self) -> PruningConfig:
        # Read when first used: vLLM makes another processor for each chat, only to count its images.
        return config_of(self.info.ctx.model_config)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        # The vision tower sees whole images: memory is profiled, and the encoder's budget set, with unpruned ones.
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, RATIO: 1.0}
        return inputs

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        # The encoder's cache, the prefix cache and any store outside this process: another configuration's tokens are
        # not these. A request's own ratio is in vLLM's hash already.
        mark = self.pruning.fingerprint()
        hashes = super()._get_mm_hashes(inputs)
        return {name: [f"{one}-{mark}" for one in own] if name == "image" else own for name, own in hashes.items()}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        ratio = ratio_of(hf_kwargs, self.pruning.ratio)
        data = super()._apply_hf_processor_main(mm_items, without_ratio(hf_kwargs))
        images = mm_items.get("image")
        if images and not isinstance(images, ImageEmbeddingItems):
            data[RATIO] = torch.full((len(images),), ratio, dtype=torch.float64)
        return data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, without_ratio(hf_processor_mm_kwargs))
        return {**fields, RATIO: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, without_ratio(hf_processor_mm_kwargs), out_mm_kwargs)
        if isinstance(mm_items.get("image"), ImageEmbeddingItems):
            return updates  # a client's own embeddings are taken as they are
        ratio = ratio_of(hf_processor_mm_kwargs, self.pruning.ratio)
        return [
            dataclasses.replace(update, replacement=functools.partial(_shortened, update.replacement, ratio))
            if update.modality == "image"
            else update
            for update in updates
        ]


def _shortened(replacement: Any, ratio: float, item: int) -> PromptUpdateDetails:
    """What vLLM writes for image number ``item``, with fewer placeholders."""
    whole = replacement(item) if callable(replacement) else replacement
    if not isinstance(whole, PromptUpdateDetails):
        whole = PromptUpdateDetails.from_seq(whole)
    is_embed = [True] * len(whole.full) if whole.is_embed is None else whole.is_embed(whole.full).tolist()
    return dataclasses.replace(whole, full=shortened(whole.full, is_embed, ratio))
