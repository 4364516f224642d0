"""What a pruner wants to know about the vision encoder of a model of vLLM: its attention runs in fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

from llava.adapters.transformers.attention import Call
from llava.adapters.transformers.encoder import EncoderView
from llava.adapters.transformers.family import Model


class ServedEncoder(EncoderView):
    """As of a model of transformers, from the queries, keys and values that each layer hands to its kernel.

    The weights of the queries that matter are computed beside the kernel, in the layers that the pruner reads alone.
    """

    def _tower_of(self, model: Model) -> Model:
        return model.vision_tower.vision_model

    def _attention_modules(self) -> dict[str, Model]:
        return {
            name: module
            for name, module in self.tower.named_modules()
            if isinstance(getattr(module, "attn", None), MMEncoderAttention)
        }

    def _depth_read(self, config: Any) -> int:
        return len(self.attention)  # vLLM loads no layer that is not read

    def _watch(self, attention: Model, look: Callable[[Call], None]) -> Callable[[], None]:
        heads = attention.num_heads_per_partition

        def hook(kernel: Model, args: tuple[torch.Tensor, ...]) -> None:
            query, key, value = (
                _of_all_ranks(one.unflatten(-1, (heads, -1)).transpose(1, 2), attention.tp_size) for one in args[:3]
            )
            look(Call(query, key, None, attention.scale, None, False, value))

        return attention.attn.register_forward_pre_hook(hook).remove


def _of_all_ranks(heads: torch.Tensor, ranks: int) -> torch.Tensor:
    """(B, h, T, d) of this rank's heads -> (B, H, T, d)."""
    return heads if ranks == 1 else get_tp_group().all_gather(heads.contiguous(), dim=1)
