"""Selection on a CPU: one image at a time, products in PyTorch and small steps in NumPy.

NumPy's small operations cost a fraction of PyTorch's. Its products would run on threads of their own, and after a
product threads spin for milliseconds: these and PyTorch's, which compute the rest of the model, would keep each other
waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from llava.pruning.kernels import EXHAUSTED

BLOCK = 64
"""How many kernel rows are computed at once: enough for a matrix product, few enough to be used up."""

STRIP = 96
"""How many columns of a symmetric product are computed at once: enough for a matrix product, few enough to leave out
almost half of the matrix."""


def gram(x: torch.Tensor) -> torch.Tensor:
    """``x x^T`` of every image by little more than half the work: (B, N, D) -> (B, N, N), both float32."""
    product = x.new_empty(len(x), x.shape[1], x.shape[1])
    for image, found in zip(x, product, strict=True):
        _multiply(image, found)
    return product


def cosine_similarity(features: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of tokens: (B, N, D), floating -> (B, N, N), float32; 0 beside a token of zeros."""
    batch, n, _ = features.shape
    similarity = torch.empty(batch, n, n, dtype=torch.float32)
    for image, found in zip(_float32(features), similarity, strict=True):
        _multiply(torch.nn.functional.normalize(image, dim=-1), found)
    return similarity


@np.errstate(all="ignore")
def ot_select(features: torch.Tensor, k: int, gamma: float) -> torch.Tensor:
    """``greedy_select(ot_kernel(features, gamma), k)`` without the kernel: (B, N, D), floating -> (B, k), int64."""
    return _stack(greedy_order(*_ot_rows(image, gamma), k) for image in _float32(features))


@np.errstate(all="ignore")
def greedy_select(kernel: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy maximisation of ``log det K_C``: (B, N, N), float32 -> (B, k), int64, in greedy order."""
    return _stack(greedy_order(rows.diagonal().numpy().copy(), rows.__getitem__, k) for rows in kernel.detach())


@np.errstate(all="ignore")
def max_min_select(distance: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy max-min diversity: (B, N, N), float32 -> (B, k), int64, in the order of selection."""
    return _stack(max_min_order(rows, k) for rows in distance.detach().contiguous().numpy())


def greedy_order(gain: np.ndarray, rows: Callable[[torch.Tensor], torch.Tensor], k: int) -> list[int]:
    """Greedy MAP over a kernel of which only the rows that are read are computed.

    They are computed in blocks: with the row of the token that was chosen come those of the tokens that gain most
    beside it, which are the likeliest to be chosen next.

    Parameters
    ----------
    gain : array (N,), float32
        The kernel's diagonal; overwritten.
    rows : callable, (m,) int64 -> (m, N), float32
        Rows of the kernel.
    k : int
        1 <= k <= N.

    Returns
    -------
    list of int
        In greedy order; ties go to the lowest index.
    """
    exhausted = EXHAUSTED * gain.max()
    factor = torch.empty(k, len(gain), dtype=torch.float32)
    known: dict[int, torch.Tensor] = {}
    order: list[int] = []
    for step, row in enumerate(factor.numpy()):
        chosen = int(gain.argmax())
        if gain[chosen] <= exhausted:
            # From here on gains are rounding errors that no further step changes.
            return order + np.argsort(-gain, kind="stable")[: k - step].tolist()
        order.append(chosen)
        if len(order) == k:
            break
        if chosen not in known:
            wanted = _likeliest(gain, chosen, known)
            known.update(zip(wanted, rows(torch.tensor(wanted)), strict=True))
        # `row` is the same memory as `factor[step]`.
        torch.addmv(known[chosen], factor[:step].T, factor[:step, chosen], alpha=-1, out=factor[step])
        row /= np.sqrt(gain[chosen])
        gain -= row * row
        gain[chosen] = -math.inf
    return order


def max_min_order(distance: np.ndarray, k: int) -> list[int]:
    """Greedy max-min diversity over distances (N, N); the diagonal is not read."""
    chosen = int(_nearest_neighbour(distance).argmax())
    nearest = np.full(len(distance), math.inf, distance.dtype)  # distance to the closest token taken so far
    order = [chosen]
    while len(order) < k:
        np.minimum(nearest, distance[chosen], out=nearest)
        nearest[chosen] = -math.inf
        chosen = int(nearest.argmax())
        order.append(chosen)
    return order


def _nearest_neighbour(distance: np.ndarray) -> np.ndarray:
    """Each token's distance to the closest other token: (N, N) -> (N,)."""
    nearest = np.empty(len(distance), distance.dtype)
    for begin in range(0, len(distance), BLOCK):
        others = distance[begin : begin + BLOCK].copy()
        np.fill_diagonal(others[:, begin:], math.inf)
        nearest[begin : begin + BLOCK] = others.min(axis=1)
    return nearest


def _multiply(x: torch.Tensor, found: torch.Tensor, divisor: torch.Tensor | None = None) -> None:
    """Write ``x diag(1 / divisor) x^T`` of one image (N, D) to ``found``, (N, N)."""
    for begin in range(0, len(x), STRIP):
        end = begin + STRIP
        strip = x[begin:end] if divisor is None else x[begin:end] / divisor
        # With `out` it is float32 even under autocast.
        torch.mm(x[begin:], strip.T, out=found[begin:, begin:end])
        found[begin:end, end:] = found[end:, begin:end].T


def _ot_rows(x: torch.Tensor, gamma: float) -> tuple[np.ndarray, Callable[[torch.Tensor], torch.Tensor]]:
    """Diagonal and row function of OTPrune's kernel ``I + gamma S S^T`` for tokens (N, D)."""
    numbers = x.numpy()
    energy = np.einsum("nd,nd->d", numbers, numbers)  # for PyTorch, columns are ten times the work
    similarity = torch.empty(len(x), len(x), dtype=torch.float32)
    _multiply(x, similarity, torch.from_numpy(energy).clamp_min(torch.finfo(torch.float32).tiny))

    def rows(tokens: torch.Tensor) -> torch.Tensor:
        kernel = torch.empty(len(tokens), len(x), dtype=torch.float32)
        torch.mm(similarity[tokens], similarity, out=kernel).mul_(gamma)
        kernel[torch.arange(len(tokens)), tokens] += 1
        return kernel

    numbers = similarity.numpy()
    return 1 + np.float32(gamma) * np.einsum("nm,nm->n", numbers, numbers), rows


def _likeliest(gain: np.ndarray, chosen: int, known: dict[int, torch.Tensor]) -> list[int]:
    """The chosen token and those of largest gain, without the known ones: at most `BLOCK` and one."""
    first = max(0, len(gain) - BLOCK)
    largest = np.argpartition(gain, first)[first:].tolist()
    return [token for token in {chosen, *largest} if token not in known]


def _float32(features: torch.Tensor) -> torch.Tensor:
    return features.detach().float().contiguous()


def _stack(orders) -> torch.Tensor:
    return torch.tensor(list(orders), dtype=torch.int64)
