"""The part in the worker: a model of vLLM that returns k embeddings per image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any, ClassVar

import torch
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava.adapters.transformers.encoder import Signals, of_tokens
from llava.adapters.transformers.family import Inputs
from llava.adapters.vllm import mrope
from llava.adapters.vllm.encoder import ServedEncoder
from llava.adapters.vllm.families import Family, Mixin
from llava.adapters.vllm.processor import config_of
from llava.adapters.vllm.switch import RATIO, ratio_of
from llava.pruning import KeptTokens, Pruner, deferred_checks, kept_count
from llava.pruning.reduce import reduce_images
from llava.pruning.signals import ENCODER_SIGNALS, content_key
from llava.pruning.tokens import ImageTokens

logger = init_logger("vllm.otprune")  # vLLM shows only what is logged below its own name


class PrunedModel(Mixin):
    """Stands before a model of vLLM among the bases of a class."""

    family: ClassVar[Family]
    positions: ClassVar[str] = "compact"
    """What vLLM numbers positions like; methods with the other ``position_ids`` are refused."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        lora = vllm_config.lora_config
        if lora is not None and lora.enable_tower_connector_lora:
            raise ValueError(
                "LoRA on the vision tower or the connector counts unpruned tokens: switch it or BASELINE off"
            )
        config = config_of(vllm_config.model_config)
        pruner = config.build_pruner()
        if pruner.position_ids not in ("auto", self.positions):
            raise ValueError(f"position_ids={pruner.position_ids}: vLLM has {self.positions} positions here")
        if pruner.needs & ENCODER_SIGNALS and self.family.to_tokens is None:
            kind = vllm_config.model_config.hf_config.model_type
            raise ValueError(f"{config.method} looks at the vision encoder, which is not available for {kind} in vLLM")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.prune_with(pruner)
        # The scheduler counts kept tokens, but the tower works on all: no more at once than were profiled.
        self._tokens_at_once = vllm_config.scheduler_config.max_num_batched_tokens
        most = MULTIMODAL_REGISTRY.get_processing_info(vllm_config.model_config).get_max_image_tokens()
        line = "%s: of the largest image %d of %d"
        logger.info_once(line, config.describe(), kept_count(most, ratio_of({}, config.ratio)), most, scope="global")

    def prune_with(self, pruner: Pruner) -> None:
        """Let a method choose from the next image on; a `ValueError` if it needs what the vision encoder has not."""
        encoder = ServedEncoder(self, pruner) if pruner.needs & ENCODER_SIGNALS else None
        if encoder is not None:
            pruner.check_model(None, encoder.width)
        self._image_pruner, self._encoder = pruner, encoder

    def embed_multimodal(self, **inputs: Any) -> Sequence[torch.Tensor]:
        """Encode images, and let the pruner choose."""
        ratios = inputs.pop(RATIO, None)
        if ratios is None:  # a client's own embeddings
            return super().embed_multimodal(**inputs)
        kept: list[torch.Tensor] = []
        ratios = [float(ratio) for ratio in ratios]
        for part, some in self._batches(inputs, len(ratios)):
            if min(ratios[part]) == 1:
                kept += super().embed_multimodal(**some)
                continue
            nothing: AbstractContextManager[Signals] = nullcontext({})
            with nothing if self._encoder is None else self._encoder.observed() as patches:
                embeddings = super().embed_multimodal(**some)
            kept += self._kept(embeddings, some, patches, ratios[part])
        return kept

    def _batches(self, inputs: Inputs, count: int) -> Iterator[tuple[slice, dict[str, Any]]]:
        """(which images, their inputs): as many images at once as were profiled."""
        sizes, per_unit = self.family.sizes(inputs), self.family.unit_tokens(self.config)
        edges = [0, *accumulate(sizes)]
        first = 0
        while first < count:
            last = first + 1
            while last < count and (edges[last + 1] - edges[first]) * per_unit <= self._tokens_at_once:
                last += 1
            part, units = slice(first, last), slice(edges[first], edges[last])
            yield (
                part,
                {
                    name: own if getattr(own, "ndim", 1) == 0 else own[units if name == self.family.flat else part]
                    for name, own in inputs.items()
                },
            )
            first = last

    def _kept(
        self, embeddings: Sequence[torch.Tensor], inputs: Inputs, patches: Signals, ratios: Sequence[float]
    ) -> list[torch.Tensor]:
        """The kept rows (k_i, W) of each image's (N_i, W), of which the first columns are what the decoder reads.

        ``patches`` are the vision encoder's signals.
        """
        width = self.config.get_text_config().hidden_size
        features = [one[:, :width] for one in embeddings]
        layouts = self.family.layouts(self, features, inputs)
        signals = self._signals(features, inputs, patches)
        images = [ImageTokens(*own) for own in zip(features, layouts, signals, strict=True)]
        kept: dict[int, KeptTokens] = {}
        for ratio in set(ratios):
            own = [number for number, other in enumerate(ratios) if other == ratio]
            with deferred_checks():  # nobody could mend what they find, and the host would wait for the device
                left = reduce_images(self._image_pruner, [images[i] for i in own], ratio)
            kept.update(zip(own, left, strict=True))
        return [
            _of_first_rank(torch.cat([kept[i].features, one[kept[i].indices, width:]], dim=1))
            for i, one in enumerate(embeddings)
        ]

    def _signals(self, features: Sequence[torch.Tensor], inputs: Inputs, patches: Signals) -> list[dict[str, Any]]:
        """What the method looks at beside each image's features (N_i, D)."""
        seen = of_tokens(self, self.family, features, inputs, patches)
        signals: list[dict[str, Any]] = [{name: own[i] for name, own in seen.items()} for i in range(len(features))]
        if "image_keys" in self._image_pruner.needs:
            pixels = inputs["pixel_values"]
            if self.family.flat:
                pixels = inputs[self.family.flat].split(self.family.sizes(inputs))
            for own, values in zip(signals, pixels, strict=True):
                own["image_keys"] = content_key(values)
        return signals


class PrunedMRopeModel(PrunedModel):
    """A model whose positions have three axes: kept tokens keep their row and column.

    vLLM's way of pruning video (EVS) serves here for images: position columns travel with the embeddings, and the model
    runner lets the model put them in. What is written into the columns, and how they are read, is our own (`mrope`).
    """

    positions: ClassVar[str] = "original"
    _to_place: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        settings = vllm_config.model_config.multimodal_config
        if settings.video_pruning_rate:
            raise ValueError("--video-pruning-rate and BASELINE cannot be used together: videos are refused")
        # What the runner looks at before it calls recompute_mrope_positions.
        settings.video_pruning_rate = 1e-9
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _grid(self, grid_thw: torch.Tensor) -> tuple[int, int]:
        merge = self.config.vision_config.spatial_merge_size
        _, rows, columns = grid_thw.tolist()
        return rows // merge, columns // merge

    def _postprocess_image_embeds_evs(self, embeddings: Sequence[torch.Tensor], inputs: Any) -> list[torch.Tensor]:
        columns = [mrope.to_columns(*self._grid(grid)) for grid in inputs["image_grid_thw"]]
        return [torch.cat([one, own.to(one)], dim=1) for one, own in zip(embeddings, columns, strict=True)]

    def get_mrope_input_positions(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Any, int]:
        """Exact for all text; see `mrope.prompt_positions`."""
        images = [
            (one.mm_position.offset, one.mm_position.length, *self._grid(one.data["image_grid_thw"].data))
            for one in sorted(mm_features, key=lambda one: one.mm_position.offset)
        ]
        return mrope.prompt_positions(len(input_tokens), images)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        """Put a request's kept tokens of this step in their places; see `mrope.place`.

        vLLM's own function misplaces a second image where a step (chunked prefill, or a prefix from the cache) begins
        inside the first.
        """
        if multimodal_embeddings:
            multimodal_embeddings, offsets = mrope.split(multimodal_embeddings)
            ids = torch.as_tensor(input_ids, device=mrope_positions.device)
            is_image, is_start = ids == self.config.image_token_id, ids == self.config.vision_start_token_id
            offsets = offsets.to(mrope_positions.device)
            mrope_positions = mrope.place(mrope_positions, is_image, is_start, offsets, num_computed_tokens)
        return multimodal_embeddings, mrope_positions, int(mrope_positions.max()) + 1 - mrope_positions.shape[1]

    # vLLM's runner for CPUs does not call the function above: there, and only there, the model does it on its own.

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> torch.Tensor:
        if multimodal_embeddings and multimodal_embeddings[0].shape[1] > self.visual.out_hidden_size:
            multimodal_embeddings, offsets = mrope.split(multimodal_embeddings)
            self._to_place = is_multimodal, offsets
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._to_place is not None:
            (is_image, offsets), self._to_place = self._to_place, None
            positions = positions.clone()
            positions[:, : len(is_image)][:, is_image] += offsets
        return super().forward(input_ids, positions, *args, **kwargs)


def _of_first_rank(values: torch.Tensor) -> torch.Tensor:
    """All ranks of tensor parallelism chose; one choice counts."""
    group = get_tp_group()
    return values if group.world_size == 1 else group.broadcast(values.contiguous(), src=0)
