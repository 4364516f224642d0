"""Optimal-transport distances between kept tokens and all tokens, and what the greedy selection guarantees.

Both distances take the tokens as uniformly weighted points. All arithmetic is in float64 on the CPU: distances between
nearly equal sets are differences of large numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llava.model.llava_arch import gamma_for_width, greedy_select, ot_kernel


@dataclass(frozen=True)
class Guarantee:
    """A greedy selection's log det K_C, and a bound that no subset of the same size exceeds."""

    value: float
    bound: float

    @property
    def share(self) -> float:
        """At least this part of the optimum is reached; it is never below 1 - 1/e."""
        return self.value / self.bound if self.bound > 0 else 1.0


def wasserstein(full: torch.Tensor, kept: torch.Tensor) -> float:
    """Exact 2-Wasserstein distance between token sets (N, D) and (k, D), in the unit of the features.

    Raises
    ------
    ImportError
        Without POT (the extra "figures").
    ValueError
        For empty sets, other widths, or values that are not finite.
    RuntimeError
        If the solver stops before the optimum.

    Source: Flamary et al., POT: Python Optimal Transport, JMLR 2021 (network simplex).
    """
    _check(full, kept)
    return transport_cost(squared_distances(full, kept)) ** 0.5


def transport_cost(cost: np.ndarray) -> float:
    """The least mean cost of moving N uniformly weighted points onto k, given the costs (N, k), float64.

    Raises `ImportError` and `RuntimeError` as `wasserstein` does.
    """
    ot = _pot()
    # Scaled, for the solver's tolerances are absolute.
    scale = float(cost.max()) or 1.0
    scaled = np.ascontiguousarray(cost / scale)
    value, log = ot.emd2(ot.unif(len(cost)), ot.unif(cost.shape[1]), scaled, numItermax=10**8, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"the transport problem was not solved: {log['warning']}")
    return max(float(value), 0.0) * scale


def gaussian_distance(full: torch.Tensor, kept: torch.Tensor) -> float:
    """2-Wasserstein distance between the Gaussians of the same means and covariances (Bures); at most the exact one.

    Takes and raises what `wasserstein` does. With centred sets A / sqrt(N) and B / sqrt(k) the cross term
    tr((S_A^1/2 S_B S_A^1/2)^1/2) is the nuclear norm of A B^T: an N x k matrix in place of two D x D roots.

    Source: Dowson and Landau, Journal of Multivariate Analysis 12, 1982.
    """
    _check(full, kept)
    origin = _rows(full).mean(0)
    x, y = _rows(full) - origin, _rows(kept) - origin
    means = y.mean(0)
    y -= means
    x, y = x / len(x) ** 0.5, y / len(y) ** 0.5
    shared = torch.linalg.svdvals(x @ y.T).sum()
    squared = means.square().sum() + x.square().sum() + y.square().sum() - 2 * shared
    return float(squared.clamp_min(0).sqrt())


def squared_distances(full: torch.Tensor, kept: torch.Tensor) -> np.ndarray:
    """Squared Euclidean distances (N, k), float64; raises `ImportError` as `wasserstein` does."""
    points, others = _rows(full), _rows(kept)
    origin = others.mean(0)  # around it, the products that cancel are smaller
    return _pot().dist((points - origin).numpy(), (others - origin).numpy())


def objective(features: torch.Tensor, indices: Sequence[int] | torch.Tensor, gamma: float | None = None) -> float:
    """OTPrune's objective of a selection, log det K_C with ``K = I + gamma S S^T``, of features (N, D).

    ``gamma`` is that of `gamma_for_width` unless given.
    """
    return log_det(objective_kernel(features) if gamma is None else ot_kernel(features, gamma), indices)


def objective_kernel(features: torch.Tensor) -> torch.Tensor:
    """The kernel (N, N) whose log det OTPrune maximises unless it is given a gamma."""
    return ot_kernel(features, gamma_for_width(features.shape[-1]))


def log_det(kernel: torch.Tensor, indices: Sequence[int] | torch.Tensor) -> float:
    """log det of the rows and columns ``indices`` of a kernel (N, N); 0 without any."""
    chosen = torch.as_tensor(indices, dtype=torch.int64, device=kernel.device)
    return float(torch.linalg.slogdet(kernel[chosen][:, chosen].cpu().double()).logabsdet)


def guarantee(kernel: torch.Tensor, k: int) -> Guarantee:
    """The greedy selection's value against an upper bound of the optimum.

    The bound is the smallest of: after every greedy step, what is reached plus the k largest gains that are left
    (log det is submodular, and monotone as K >= I); and the sum of the logarithms of K's k largest eigenvalues.

    The kernel (N, N) is symmetric, with eigenvalues at least 1 (`ot_kernel`).

    Source: Nemhauser, Wolsey and Fisher, Mathematical Programming 14, 1978; Minoux, 1978, for the bound after a step.
    """
    order = greedy_select(kernel, k).tolist()
    matrix = kernel.cpu().double()
    gains = matrix.diagonal().clone()
    factor = matrix.new_zeros(k, len(matrix))
    value, bounds = 0.0, [float(torch.linalg.eigvalsh(matrix)[-k:].clamp_min(1).log().sum())]
    for step, chosen in enumerate(order):
        bounds.append(value + float(gains.clamp_min(1).topk(k).values.log().sum()))
        pivot = gains[chosen].clone()
        value += float(pivot.log())
        factor[step] = (matrix[chosen] - factor[:step, chosen] @ factor[:step]) / pivot.sqrt()
        gains -= factor[step].square()
        gains[chosen] = 1
    bounds.append(value + float(gains.clamp_min(1).topk(k).values.log().sum()))
    return Guarantee(value, min(bounds))


def _pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise ImportError("the exact distance needs POT: pip install 'llava[figures]'") from error
    return ot


def _rows(points: torch.Tensor) -> torch.Tensor:
    return points.detach().to("cpu", torch.float64)


def _check(full: torch.Tensor, kept: torch.Tensor) -> None:
    if full.ndim != 2 or kept.ndim != 2 or full.shape[1] != kept.shape[1]:
        raise ValueError(f"the sets must be (N, D) and (k, D), not {tuple(full.shape)} and {tuple(kept.shape)}")
    if not len(full) or not len(kept):
        raise ValueError("there is no distance from a set without tokens")
    for name, points in (("full", full), ("kept", kept)):
        if not torch.isfinite(points).all():
            raise ValueError(f"the {name} set has values that are not finite")
