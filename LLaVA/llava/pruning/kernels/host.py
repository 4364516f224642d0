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

LEADING = 16
"""How many gains are computed anew at once, where the largest is one of an earlier step."""

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


@np.errstate(all="ignore")
def facility_select(
    similarity: torch.Tensor, k: int, weight: torch.Tensor | None, served: torch.Tensor | None
) -> torch.Tensor:
    """Greedy facility location: (B, N, N), float32 -> (B, k), int64, in the order of selection."""
    ones, zeros = torch.ones(similarity.shape[:2]), torch.zeros(similarity.shape[:2])
    images = zip(similarity, ones if weight is None else weight, zeros if served is None else served, strict=True)
    arrays = ([part.detach().float().numpy() for part in image] for image in images)
    return _stack(facility_order(similar, weights, nearest, k) for similar, weights, nearest in arrays)


def greedy_order(gain: np.ndarray, rows: Callable[[torch.Tensor], torch.Tensor], k: int) -> list[int]:
    """Greedy MAP over a kernel of which only the rows that are read are computed; ties go to the lowest index.

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


def facility_order(similarity: np.ndarray, weight: np.ndarray, served: np.ndarray, k: int) -> list[int]:
    """Greedy facility location over symmetric similarities (N, N), by the least work.

    Gains only fall: a token whose gain of now exceeds the earlier gains of all others is the next. ``weight`` (N,) is
    of each token as a choice, ``served`` (N,) how well it is served before anything is taken.
    """
    served, few = served.copy(), min(LEADING, len(similarity))
    order: list[int] = []
    for step in range(k):
        if step < 2:  # the first token changes every gain
            gain = weight * _served_better(similarity, served)
            known = np.full(len(gain), step)  # the step that a gain was computed at
            gain[order], known[order] = -math.inf, k
        while known[chosen := int(gain.argmax())] < step:
            leading = np.argpartition(gain, -few)[-few:]
            leading = np.append(leading[known[leading] < step], chosen)  # ties may have left it out
            gain[leading] = weight[leading] * _served_better(similarity[leading], served)
            known[leading] = step
        order.append(chosen)
        gain[chosen], known[chosen] = -math.inf, k
        np.maximum(served, similarity[chosen], out=served)
    return order


def _served_better(rows: np.ndarray, served: np.ndarray) -> np.ndarray:
    """By how much each of some tokens (m, N) would serve all others better: (m,)."""
    better = np.empty(len(rows), rows.dtype)
    for begin in range(0, len(rows), BLOCK):
        np.maximum(rows[begin : begin + BLOCK] - served, 0).sum(axis=1, out=better[begin : begin + BLOCK])
    return better


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
