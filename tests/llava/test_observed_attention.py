"""What pruners see of the attention: exact to float32 in a model of half precision, and all heads on every rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llava.model.language_model.observed_attention import observed_attention, query_attention, ranks_of_heads
from llava.model.multimodal_encoder.observations import cls_attention, mean_keys, received_attention, wide_head
from llava.pruning.attention import attention_of_queries
from llava.pruning.rows import Rows
from tensor_parallel import answer_as_rank, answers

HEADS, WIDTH, LENGTH = 2, 16, 24


class Projection(nn.Module):
    """A linear map with weights of -1, 0 and 1: whole numbers that half precision holds, until they are multiplied."""

    def __init__(self, draw: torch.Generator):
        super().__init__()
        self.weight = torch.randint(-1, 2, (HEADS * WIDTH, HEADS * WIDTH), generator=draw).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


def layer() -> SimpleNamespace:
    """What is read of a decoder's or an encoder's layer; logits have a few digits more than bfloat16."""
    draw = torch.Generator().manual_seed(1)
    q_proj, k_proj, v_proj = (Projection(draw) for _ in range(3))
    attention = SimpleNamespace(q_proj=q_proj, k_proj=k_proj, v_proj=v_proj, head_dim=WIDTH, num_heads=HEADS)
    attention.scaling = attention.scale = WIDTH**-0.5 / 50
    attention.config = SimpleNamespace(num_attention_heads=HEADS)
    return SimpleNamespace(self_attn=attention, input_layernorm=nn.Identity(), layer_norm1=nn.Identity())


def in_decoder(look):
    def observe(layer, hidden):
        valid = torch.ones(2, LENGTH, dtype=torch.bool)
        rotary = (hidden.new_ones(1, LENGTH, WIDTH), hidden.new_zeros(1, LENGTH, WIDTH))
        return look(layer, hidden, rotary, valid)

    return observe


def of_queries(name):
    def look(layer, hidden, rotary, valid):
        rows = Rows.start(hidden, valid, torch.full(valid.shape, -1))
        raters = torch.arange(LENGTH).expand(2, -1) % 5 == 4

        def ask(own, queries):
            return query_attention(layer, hidden[own], rotary, valid[own], queries)

        return attention_of_queries({name}, rows, raters, ask)[name]

    return in_decoder(look)


def received(layer, hidden, rotary, valid):
    image = torch.where(torch.arange(LENGTH) < LENGTH // 2, 0, -1).expand(2, -1)
    return torch.stack(observed_attention(layer.self_attn, hidden, rotary, valid, image, image < 0, None)[1:])


LOOKS = {
    "last": of_queries("last_attention"),
    "raters": of_queries("rater_attention"),
    "received": in_decoder(received),
    "cls": cls_attention,
    "received by patches": received_attention,
    "mean keys": mean_keys,
    "wide head": lambda layer, hidden: wide_head(layer, hidden)[1],
}


@pytest.mark.parametrize("half", ["autocast", "bfloat16"])
@pytest.mark.parametrize("look", LOOKS)
def test_half_precision_rounds_no_product(look, half):
    hidden = torch.randint(-3, 4, (2, LENGTH, HEADS * WIDTH), generator=torch.Generator().manual_seed(2)).float()
    exact = LOOKS[look](layer(), hidden)
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half == "autocast"):
        found = LOOKS[look](layer(), hidden if half == "autocast" else hidden.bfloat16())
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)


def test_tensor_parallel_ranks_keep_the_tokens_of_the_whole_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    torch.multiprocessing.spawn(answer_as_rank, (str(tmp_path), str(tmp_path / "meeting")), nprocs=2)
    expected = answers(model)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        # Sums over the ranks round otherwise.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_heads_that_are_somewhere_else_are_refused():
    attention = layer().self_attn
    attention.config.num_attention_heads = 3 * HEADS
    with pytest.raises(NotImplementedError, match=rf"{HEADS} of the decoder's {3 * HEADS} attention heads"):
        ranks_of_heads(attention, HEADS)
