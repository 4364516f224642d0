"""What makes an order a greedy one, whichever way rounding decides its near-ties."""

from __future__ import annotations

import torch


def assert_is_greedy(kernel: torch.Tensor, order, precision: float = 1e-5) -> None:
    """Every step of ``order`` takes a largest gain of log det K_C, up to ``precision`` of the largest gain of all.

    Gains are computed in float64 from ``kernel`` (N, N). Below 1e-6 of the largest they are rounding errors, of which
    any may come first.
    """
    order = torch.as_tensor(order).tolist()
    assert len(set(order)) == len(order) and all(0 <= token < len(kernel) for token in order)
    rest = kernel.double().clone()
    largest = float(rest.diagonal().max())
    for step, chosen in enumerate(order):
        gain = rest.diagonal()
        best = float(gain.max())
        if best <= 1e-6 * largest:
            return
        assert float(gain[chosen]) >= best - precision * largest, f"step {step} took {gain[chosen]} of {best}"
        rest = rest - torch.outer(rest[:, chosen], rest[chosen]) / gain[chosen]
        rest[chosen, :] = rest[:, chosen] = 0
