"""What methods read off a decoder layer's attention, whichever model computes the rows of its softmax."""

from __future__ import annotations

from collections.abc import Callable, Container

import torch

from llava.pruning.rows import TEXT, Rows

MOST_LOGITS = 1 << 24
"""Attention logits that are held at a time: 64 MiB in float32."""

Ask = Callable[[slice, torch.Tensor], torch.Tensor]
"""(rows of the batch, queries (b, q), int64) -> their rows of the causal softmax (b, H, q, T), float32."""


@torch.no_grad()
def attention_of_queries(
    needs: Container[str], rows: Rows, raters: torch.Tensor | None, ask: Ask
) -> dict[str, torch.Tensor]:
    """The signals that a few queries are enough for: name -> (B, T, ...), see `Signals`.

    Parameters
    ----------
    needs : container of str
        Of "last_attention", "next_attention" and "rater_attention"; other names are passed over.
    rows : Rows
        As the layer sees them.
    raters : Tensor (B, T), bool, optional
        Over the whole prompts; a row without any gets zeros.
    ask : callable
    """
    seen = {}
    for name in ("last_attention", "next_attention"):
        if name in needs:
            last = rows.prompt.shape[1] - 1 - rows.prompt.flip(1).int().argmax(dim=1)  # (B,)
            seen[name] = ask(slice(None), last[:, None])[:, :, 0].transpose(1, 2)
    if "rater_attention" in needs:
        assert raters is not None
        present = raters.to(rows.column.device).gather(1, rows.column) & rows.valid
        means = []
        for row, own in enumerate(present.cpu()):  # one look at the whole batch
            queries = own.nonzero().T.to(present.device, non_blocking=True)
            if queries.shape[1]:
                means.append(ask(slice(row, row + 1), queries)[0].mean(dim=(0, 1)))
            else:
                means.append(present.new_zeros(present.shape[1], dtype=torch.float32))
        seen["rater_attention"] = torch.stack(means)
    return seen


def received_by_images(
    strongest: Callable[[torch.Tensor], torch.Tensor],
    image_id: torch.Tensor,
    asking: torch.Tensor,
    heads: int,
    most_logits: int = MOST_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What image tokens receive in each query's strongest head; queries are taken in chunks.

    Parameters
    ----------
    strongest : callable
        Queries (q,), int64 -> the largest weight of any head (B, q, T), float32; asked for all queries in order.
    image_id : Tensor (B, T), int64
        Number of the image that a position belongs to, `TEXT` for text and padding.
    asking : Tensor (B, T), bool
        Text whose attention counts.
    heads : int
    most_logits : int
        Bound on B * heads * T * (queries at a time).

    Returns
    -------
    visual : Tensor (B, T), float32
        Mean over the visual tokens of the same image of what they pay a visual token; 0 at text.
    text : Tensor (B, T), float32
        The same, summed over the ``asking`` tokens. Causality leaves those after the visual token.
    """
    batch, length = image_id.shape
    visual = torch.zeros(batch, length, dtype=torch.float32, device=image_id.device)
    text, judges = torch.zeros_like(visual), torch.zeros_like(visual)
    every = torch.arange(length, device=image_id.device)
    for here in every.split(max(1, most_logits // (batch * heads * length))):
        paid = strongest(here)
        same = (image_id[:, here, None] == image_id[:, None, :]) & (image_id[:, None, :] != TEXT)
        visual += (paid * same).sum(dim=1)
        judges += same.sum(dim=1)
        text += (paid * asking[:, here, None]).sum(dim=1)
    return visual / judges.clamp_min(1), text.masked_fill(image_id == TEXT, 0)
