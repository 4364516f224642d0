"""Attention for training on a CPU: exact, several times as fast there as PyTorch's own in bfloat16.

PyTorch's fused CPU attention is slow in bfloat16, and the plain form keeps every score matrix for the backward pass.
Here each row of a batch is worked through on its own, so that its scores stay in the processor's cache; the backward
pass computes them again. A sequence is worked through in stretches: the tokens of one stretch see everything before
it, and among themselves what the mask says. An image's prompt is cut into a few stretches (causal attention then
skips most of what it would mask), and all questions packed after it are one stretch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AttentionInterface

ATTENTION_NAME = "llava_mini_stretched"


class _Stretched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, stretches, scale):
        out = torch.empty_like(query)
        for row in range(query.shape[0]):
            for start, end in stretches:
                probabilities = _probabilities(query[row], key[row], mask, row, start, end, scale)
                out[row, :, start:end] = torch.bmm(probabilities, value[row, :, :end])
        ctx.save_for_backward(query, key, value, mask)
        ctx.stretches, ctx.scale = stretches, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, mask = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for row in range(query.shape[0]):
            for start, end in ctx.stretches:
                probabilities = _probabilities(query[row], key[row], mask, row, start, end, ctx.scale)
                grad = grad_out[row, :, start:end]
                grad_value[row, :, :end] += torch.bmm(probabilities.transpose(1, 2), grad)
                grad_probabilities = torch.bmm(grad, value[row, :, :end].transpose(1, 2))
                grad_scores = torch._softmax_backward_data(
                    grad_probabilities, probabilities, -1, probabilities.dtype
                )  # (heads, end - start, end)
                grad_query[row, :, start:end] = torch.bmm(grad_scores, key[row, :, :end]) * ctx.scale
                grad_key[row, :, :end] += torch.bmm(grad_scores.transpose(1, 2), query[row, :, start:end] * ctx.scale)
        return grad_query, grad_key, grad_value, None, None, None


def _probabilities(query, key, mask, row, start, end, scale):
    scores = torch.bmm(query[:, start:end] * scale, key[:, :end].transpose(1, 2))  # (heads, end - start, end)
    if mask is not None:
        scores[..., start:end] += mask[row, :, start:end, start:end]
    return torch.softmax(scores, -1)


def stretched_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    stretches: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention.

    Parameters
    ----------
    query, key, value : Tensor (B, H, T, d)
        The same number of heads in all three.
    mask : Tensor (B, 1, T, T) or None
        Added to the scores. Read only within a stretch: everything before a stretch is visible to it. None: every
        token sees every token.
    stretches : sequence of (start, end), or None
        Consecutive ranges that cover ``0 .. T``; the tokens of a range see the keys ``0 .. end``. None means one.

    Returns
    -------
    Tensor (B, H, T, d)

    Raises
    ------
    ValueError
        If the stretches do not cover the sequence, one after the other.
    """
    length = query.shape[2]
    ranges = [(0, length)] if stretches is None or mask is None else [tuple(pair) for pair in stretches]
    edges = [start for start, _ in ranges] + [ranges[-1][1]]
    if (
        edges[0] != 0
        or edges[-1] != length
        or any(end != edge for (_, end), edge in zip(ranges, edges[1:], strict=True))
    ):
        raise ValueError(f"stretches must cover 0 .. {length} one after the other, got {ranges}")
    return _Stretched.apply(query, key, value, mask, ranges, query.shape[-1] ** -0.5)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    stretches: Sequence[tuple[int, int]] | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The form that transformers calls: (B, H, T, d) in, (B, T, H, d) out."""
    # Under autocast, rotary positions leave queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = stretched_attention(query, key, value, attention_mask, stretches)
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the attention known to transformers; returns the name to set as ``attn_implementation``."""
    AttentionInterface.register(ATTENTION_NAME, _attention)
    return ATTENTION_NAME


def attention_for(device: str) -> str:
    """The ``attn_implementation`` to train with: this module's on a CPU, PyTorch's own on anything else."""
    return register() if torch.device(device).type == "cpu" else "sdpa"
