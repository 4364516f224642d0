"""The published OTPrune implementation, token for token, roundings and restarts included; `OTPrune`'s ``compat``."""

from __future__ import annotations

import torch


def published_order(features: torch.Tensor, k: int, gamma: float) -> list[int]:
    """Greedy order of the published code.

    Parameters
    ----------
    features : Tensor (N, D), floating
        One image's tokens; Cholesky rows are kept in their dtype.
    k : int
    gamma : float
    """
    norm = torch.linalg.vector_norm(features, dim=-2, keepdim=True)
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    x = features.to(wide) / norm.to(wide)
    similarity = x @ x.T
    kernel = torch.eye(len(x), dtype=wide, device=x.device) + (gamma * similarity) @ similarity.T
    order: list[int] = []
    while len(set(order)) < k:
        found = _greedy(kernel, k - len(set(order)), features.dtype)
        order += found
        # What was found is blanked out of the kernel and the rest is started again from nothing.
        kernel[found, :] = 0
        kernel[:, found] = 0
    return list(dict.fromkeys(order))


def _greedy(kernel: torch.Tensor, k: int, rows_dtype: torch.dtype) -> list[int]:
    gain = kernel.diagonal().clone()
    factor = torch.zeros(k, len(gain), dtype=rows_dtype, device=kernel.device)
    chosen = int(gain.argmax())
    order = [chosen]
    for step in range(k - 1):
        explained = factor[:step, chosen] @ factor[:step]
        row = (kernel[chosen] - explained) / gain[chosen].sqrt()
        factor[step] = row
        gain = gain - row.square()
        chosen = int(gain.argmax())
        if gain[chosen] < 1e-100:
            break
        order.append(chosen)
    return order
