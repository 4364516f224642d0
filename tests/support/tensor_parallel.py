"""A model whose heads two processes share."""

from __future__ import annotations

import os

import torch
from transformers.distributed import DistributedConfig

from llava.model import LlavaLlamaForCausalLM
from llava.pruning import pruning
from tiny_llava import pad_rows, pixels, prompt
from tiny_methods import OPTIONS, RATIOS

METHODS = {"fastv": 2, "pyramiddrop": None, "sparsevlm": None, "fitprune": None, "otprune": 2}
"""Those that look at the decoder's attention, and one that does not, with the layer they are asked for."""


def answers(model) -> dict[str, torch.Tensor]:
    """Logits of two rows, one of them with two images, with each method."""
    ids, mask = pad_rows([prompt(3, 9, seed=1), prompt(6, 4, 5, seed=2)], "left")
    found = {}
    for method, layer in METHODS.items():
        with torch.no_grad(), pruning(model, method, RATIOS.get(method, 0.3), layer, **OPTIONS.get(method, {})):
            found[method] = model(input_ids=ids, attention_mask=mask, images=pixels(3)).logits
    return found


def answer_as_rank(rank: int, folder: str, meeting_point: str) -> None:
    """Write the `answers` of a saved model, as one of its two ranks, beside it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    model = LlavaLlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == model.config.hidden_size // 2
    torch.save(answers(model), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
