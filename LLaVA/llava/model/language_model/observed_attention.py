"""A decoder layer's attention as pruners see it: of a few queries apart, or of all of them, piece by piece."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.model.offload import execution_device
from llava.pruning.attention import MOST_LOGITS, Ask, received_by_images
from llava.pruning.similarity import products
from llava.pruning.tokens import gather_tokens


def observed_attention(
    attention: Any,
    normed: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    valid: torch.Tensor,
    image: torch.Tensor,
    asking: torch.Tensor,
    cache: Cache | None,
    most_logits: int = MOST_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention up to its output projection, and what visual tokens receive, from one and the same product.

    Queries are taken in chunks: the whole map (H, T, T) is never there. Softmax in float32; only ``heads`` has a
    gradient.

    Parameters
    ----------
    attention : attention module of a Llama or Mistral layer
    normed : Tensor (B, T, D)
        The layer's input after its norm.
    rotary : (cos, sin), each (1 or B, T, head width)
    valid : Tensor (B, T), bool
        False at padding.
    image, asking, most_logits
        See `received_by_images`.
    cache : Cache, or None
        Gets this layer's keys and values.

    Returns
    -------
    heads : Tensor (B, T, H * head width)
        Input of the output projection.
    visual, text : Tensor (B, T), float32
        See `received_by_images`.
    """
    batch, length, _ = normed.shape
    shape = (batch, length, -1, attention.head_dim)
    query = attention.q_proj(normed).view(shape).transpose(1, 2)  # (B, H, T, head width)
    keys = attention.k_proj(normed).view(shape).transpose(1, 2)
    values = attention.v_proj(normed).view(shape).transpose(1, 2)
    query, keys = apply_rotary_pos_emb(query, keys, *rotary)
    if cache is not None:
        cache.update(keys, values, attention.layer_idx)
    shared = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)

    ranks = ranks_of_heads(attention, query.shape[1])
    place = torch.arange(length, device=normed.device)
    heads = []

    def strongest(here: torch.Tensor) -> torch.Tensor:
        logits = products(query[:, :, here], keys) * attention.scaling  # (B, H, Q, T)
        # Padding sees itself, so that no row of the softmax is empty.
        seen = (place <= here[:, None]) & valid[:, None, :] | (place == here[:, None])  # (B, Q, T)
        weights = logits.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(dim=-1)
        heads.append(weights.to(values.dtype) @ values)
        largest = weights.detach().amax(dim=1)  # (B, Q, T)
        if ranks is not None:
            distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=ranks)
        return largest

    visual, text = received_by_images(strongest, image, asking, query.shape[1], most_logits)
    return torch.cat(heads, dim=2).transpose(1, 2).reshape(batch, length, -1), visual, text


@torch.no_grad()
def query_attention(
    layer: Any,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    valid: torch.Tensor,
    queries: torch.Tensor,
) -> torch.Tensor:
    """Attention of a few tokens to all positions in one decoder layer, for those tokens alone; without gradient.

    Parameters
    ----------
    layer : decoder layer of Llama or Mistral
    hidden : Tensor (B, T, D)
        The layer's input.
    rotary : (cos, sin), each (1 or B, T, head width)
    valid : Tensor (B, T), bool
        False at padding.
    queries : Tensor (B, Q), int64
        Where the tokens stand that ask.

    Returns
    -------
    Tensor (B, H, Q, T), float32
        Rows of the causal softmax; 0 at padding.
    """
    attention = layer.self_attn
    batch, length, _ = hidden.shape
    normed = layer.input_layernorm(hidden)
    asking = gather_tokens(normed, queries)
    query = attention.q_proj(asking).view(batch, queries.shape[1], -1, attention.head_dim).transpose(1, 2)
    cos, sin = (part.expand(batch, -1, -1) for part in rotary)
    # Both arguments are rotated by the same angles: the queries' positions.
    query, _ = apply_rotary_pos_emb(query, query, gather_tokens(cos, queries), gather_tokens(sin, queries))
    keys = _rotated_keys(attention, normed, rotary)
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)  # (B, H, T, head width)
    logits = products(query, keys) * attention.scaling  # (B, H, Q, T)
    earlier = torch.arange(length, device=hidden.device) <= queries[:, :, None]  # (B, Q, T)
    weights = logits.masked_fill(~(earlier & valid[:, None, :]).unsqueeze(1), -torch.inf).softmax(dim=-1)
    return _all_heads(weights, ranks_of_heads(attention, weights.shape[1]))


@torch.no_grad()
def keys_of(layer: Any, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The keys of one decoder layer with input ``hidden`` (B, T, D), all heads side by side: (B, T, C)."""
    device, attention = execution_device(layer), layer.self_attn
    cos, sin = (part.to(device) for part in rotary)
    keys = _rotated_keys(attention, layer.input_layernorm(hidden.to(device)), (cos, sin))  # (B, H', T, head width)
    ranks = ranks_of_heads(attention, keys.shape[1] * attention.num_key_value_groups)
    return _all_heads(keys, ranks).transpose(1, 2).flatten(2).to(hidden.device)


def _rotated_keys(attention: Any, normed: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    batch, length, _ = normed.shape
    keys = attention.k_proj(normed).view(batch, length, -1, attention.head_dim).transpose(1, 2)
    return apply_rotary_pos_emb(keys, keys, *rotary)[1]


def _all_heads(own: torch.Tensor, ranks: distributed.ProcessGroup | None) -> torch.Tensor:
    """What all ``ranks`` have of their heads, (B, heads, ...), in the order of the heads."""
    if ranks is None:
        return own
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size(ranks))]
    distributed.all_gather(parts, own.contiguous(), group=ranks)
    return torch.cat(parts, dim=1)


def ranks_of_heads(attention: Any, heads: int) -> distributed.ProcessGroup | None:
    """The tensor parallel ranks that share a layer's heads, of which this one has so many; None where it has them all.

    Each must see all heads, or they would drop different tokens: a NotImplementedError if they are shared in another
    way.
    """
    total = attention.config.num_attention_heads
    if heads == total:
        return None
    mesh = getattr(attention.q_proj.weight, "device_mesh", None)
    ranks = mesh.get_group() if mesh is not None and mesh.ndim == 1 else None
    if ranks is None or heads * distributed.get_world_size(ranks) != total:
        raise NotImplementedError(
            f"this process has {heads} of the decoder's {total} attention heads, and how the others are shared is not "
            "known: methods that rank by attention need all of them"
        )
    return ranks


def asked_of(layer: Any, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], valid: torch.Tensor) -> Ask:
    """`query_attention` of some rows of a batch, where the layer computes, which may be another device than theirs."""
    device = execution_device(layer)

    def ask(own: slice, queries: torch.Tensor) -> torch.Tensor:
        cos, sin = ((part if len(part) == 1 else part[own]).to(device) for part in rotary)
        seen = query_attention(layer, hidden[own].to(device), (cos, sin), valid[own].to(device), queries.to(device))
        return seen.to(valid.device)

    return ask
