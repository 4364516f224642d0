"""What several methods measure likeness by, and pick by: cosines, in float32 or better, and greedy MAP."""

from __future__ import annotations

import torch

from llava.pruning.kernels import fused


def wide(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x y^T`` (..., n, m) of (..., n, D) and (..., m, D), `wide` whatever autocast surrounds it."""
    with torch.autocast(x.device.type, enabled=False):
        return wide(x) @ wide(y).mT


def cosine_similarity(features: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of tokens: (B, N, D) -> (B, N, N), float32; 0 beside a token of zeros."""
    similarity = fused("cosine_similarity", features)
    if similarity is not None:
        return similarity
    with torch.autocast(features.device.type, enabled=False):
        unit = torch.nn.functional.normalize(features.float(), dim=-1)
        return unit @ unit.mT


def cosine_kernel(features: torch.Tensor) -> torch.Tensor:
    """`cosine_similarity` with a diagonal of exact ones (zeros for tokens of zeros), as a DPP's kernel.

    Its rank is at most D: once what is left is explained by what was taken (more tokens than dimensions, or only
    duplicates), the gains of `greedy_map` are rounding errors, and the rest of the budget is filled by them.
    """
    kernel = cosine_similarity(features)
    diagonal = kernel.diagonal(dim1=-2, dim2=-1)
    # A token's cosine with itself is 1, not 1 and a rounding error that would decide the first pick.
    diagonal.copy_((diagonal > 0.5).to(kernel.dtype))
    return kernel


def greedy_map(kernel: torch.Tensor, k: int) -> torch.Tensor:
    """`llava.model.llava_arch.greedy_select`, OTPrune's own greedy: (B, N, N) -> (B, k), int64, in greedy order."""
    from llava.model.llava_arch import greedy_select

    return greedy_select(kernel, k)


def text_similarity(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Cosine (..., N), float32, between every patch and a text, averaged over the text's pieces.

    Patches (..., N, C) are in a space that they share with the text (M, C), whose pieces are segments, or tokens; 0 for
    a text without pieces.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        patches = torch.nn.functional.normalize(image_embeds.float(), dim=-1)
        pieces = torch.nn.functional.normalize(text_embeds.float(), dim=-1)
        return patches @ (pieces.sum(dim=0) / max(1, len(pieces)))
