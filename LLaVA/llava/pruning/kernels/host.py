"""Selection on a CPU: one image at a time, in NumPy.

A selection is one large product and hundreds of small steps. NumPy hands ``x @ x.T`` to BLAS's syrk, which computes one
triangle and so does half the work of a product, and its small operations cost a fraction of what PyTorch's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from llava.pruning.kernels import EXHAUSTED, SMALLEST_NORM

BLOCK = 64
"""How many kernel rows are computed at once: enough for a matrix product, few enough to be used up."""

PARALLEL = 32767
"""Numbers that PyTorch handles with one thread."""


def gram(x: torch.Tensor) -> torch.Tensor:
    """``x x^T`` of every image: (B, N, D) -> (B, N, N), both float32."""
    product = x.new_empty(len(x), x.shape[1], x.shape[1])
    for image, place in zip(_arrays(x), product.numpy(), strict=True):
        np.matmul(image, image.T, out=place)
    return product


@np.errstate(all="ignore")
def cosine_similarity(features: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of tokens: (B, N, D), floating -> (B, N, N), float32; 0 beside a token of zeros.

    To the last bit `torch.nn.functional.normalize` and `gram`: methods that rank by cosines meet ties that rounding
    decides.
    """
    batch, n, _ = features.shape
    features = features.detach().float().contiguous()
    similarity = torch.empty(batch, n, n, dtype=torch.float32)
    for image, norm, place in zip(features.numpy(), _norms(features).numpy(), similarity.numpy(), strict=True):
        unit = image / np.maximum(norm, np.float32(1e-12))
        np.matmul(unit, unit.T, out=place)
    return similarity


@np.errstate(all="ignore")
def ot_select(features: torch.Tensor, k: int, gamma: float) -> torch.Tensor:
    """``greedy_select(ot_kernel(features, gamma), k)`` without the kernel: (B, N, D), floating -> (B, k), int64."""
    return _stack(greedy_order(*_ot_rows(image, gamma), k) for image in _arrays(features.float()))


@np.errstate(all="ignore")
def greedy_select(kernel: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy maximisation of ``log det K_C``: (B, N, N), float32 -> (B, k), int64, in greedy order."""
    return _stack(greedy_order(rows.diagonal().copy(), rows.__getitem__, k) for rows in _arrays(kernel))


@np.errstate(all="ignore")
def max_min_select(distance: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy max-min diversity: (B, N, N), float32 -> (B, k), int64, in the order of selection."""
    return _stack(max_min_order(rows, k) for rows in _arrays(distance))


def greedy_order(gain: np.ndarray, rows: Callable[[np.ndarray], np.ndarray], k: int) -> list[int]:
    """Greedy MAP over a kernel of which only the rows that are read are computed.

    They are computed in blocks: with the row of the token that was chosen come those of the tokens that gain most
    beside it, which are the likeliest to be chosen next.

    Parameters
    ----------
    gain : array (N,)
        The kernel's diagonal; overwritten.
    rows : callable, (m,) int64 -> (m, N)
        Rows of the kernel.
    k : int
        1 <= k <= N.

    Returns
    -------
    list of int
        In greedy order; ties go to the lowest index.
    """
    exhausted = EXHAUSTED * gain.max()
    factor = np.empty((k, len(gain)), gain.dtype)
    known: dict[int, np.ndarray] = {}
    order: list[int] = []
    for step, row in enumerate(factor):
        chosen = int(gain.argmax())
        if gain[chosen] <= exhausted:
            # From here on gains are rounding errors that no further step changes.
            return order + np.argsort(-gain, kind="stable")[: k - step].tolist()
        order.append(chosen)
        if len(order) == k:
            break
        if chosen not in known:
            wanted = _likeliest(gain, chosen, known)
            known.update(zip(wanted.tolist(), rows(wanted), strict=True))
        np.matmul(factor[:step, chosen], factor[:step], out=row)
        np.subtract(known[chosen], row, out=row)
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


def _norms(features: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of every token: (B, N, D) -> (B, N, 1), float32.

    Some tokens at a time, too few for PyTorch to start its threads, for which those of NumPy's BLAS would have to wait.
    """
    tokens = features.flatten(0, 1)
    norms = tokens.new_empty(len(tokens), 1)
    few = max(1, PARALLEL // tokens.shape[1])
    for part, place in zip(tokens.split(few), norms.split(few), strict=True):
        torch.linalg.vector_norm(part, dim=-1, keepdim=True, out=place)
    return norms.view(*features.shape[:2], 1)


def _nearest_neighbour(distance: np.ndarray) -> np.ndarray:
    """Each token's distance to the closest other token: (N, N) -> (N,)."""
    nearest = np.empty(len(distance), distance.dtype)
    for begin in range(0, len(distance), BLOCK):
        others = distance[begin : begin + BLOCK].copy()
        np.fill_diagonal(others[:, begin:], math.inf)
        nearest[begin : begin + BLOCK] = others.min(axis=1)
    return nearest


def _ot_rows(x: np.ndarray, gamma: float) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Diagonal and row function of OTPrune's kernel ``I + gamma S S^T`` for tokens (N, D)."""
    norm = np.sqrt(np.einsum("nd,nd->d", x, x))
    x = x / np.maximum(norm, SMALLEST_NORM)
    similarity = x @ x.T
    gamma = x.dtype.type(gamma)

    def rows(tokens: np.ndarray) -> np.ndarray:
        kernel = gamma * (similarity[tokens] @ similarity)
        kernel[np.arange(len(tokens)), tokens] += 1
        return kernel

    return 1 + gamma * np.einsum("nm,nm->n", similarity, similarity), rows


def _likeliest(gain: np.ndarray, chosen: int, known: dict[int, np.ndarray]) -> np.ndarray:
    """The chosen token and those of largest gain, without the known ones: at most `BLOCK` and one."""
    first = max(0, len(gain) - BLOCK)
    largest = np.argpartition(gain, first)[first:].tolist()
    return np.array([token for token in {chosen, *largest} if token not in known])


def _arrays(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _stack(orders) -> torch.Tensor:
    return torch.tensor(list(orders), dtype=torch.int64)
