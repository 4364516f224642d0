"""Half of a symmetric product on a GPU's matrix units."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 128


def gram(x: torch.Tensor) -> torch.Tensor:
    """``x x^T`` of every image: (B, N, D) -> (B, N, N), both float32.

    Only the tiles of the lower triangle are computed, where they are enough to fill the GPU. Products have TF32's
    precision where PyTorch's may, else float32's, from three TF32 products each.
    """
    batch, n, d = x.shape
    side = triton.cdiv(n, TILE)
    tiles = side * (side + 1) // 2
    if x.is_cuda and batch * tiles < torch.cuda.get_device_properties(x.device).multi_processor_count:
        return x @ x.mT
    x = x.contiguous()
    product = x.new_empty(batch, n, n)
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _gram[(tiles, batch)](x, product, n, d, TILE=TILE, DEPTH=32, PRECISION=precision, **options)
    return product


@triton.jit
def _gram(x, product, n, d, TILE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of the lower triangle and its mirror image: x (B, N, D) and product (B, N, N), float32."""
    # The tile's row r is the largest with r (r + 1) / 2 <= its number; a rounded root may miss it by one.
    number = tl.program_id(0)
    r = ((tl.sqrt(8.0 * number + 1.0) - 1.0) / 2.0).to(tl.int32)
    r += tl.where((r + 1) * (r + 2) // 2 <= number, 1, 0)
    r -= tl.where(r * (r + 1) // 2 > number, 1, 0)
    c = number - r * (r + 1) // 2

    image = tl.program_id(1).to(tl.int64)
    x += image * n * d
    product += image * n * n
    rows = (r * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (c * TILE + tl.arange(0, TILE)).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for begin in range(0, d, DEPTH):
        deep = begin + depth < d
        left = tl.load(
            x + rows[:, None] * d + (begin + depth)[None, :], mask=(rows < n)[:, None] & deep[None, :], other=0.0
        )
        right = tl.load(
            x + columns[:, None] * d + (begin + depth)[None, :], mask=(columns < n)[:, None] & deep[None, :], other=0.0
        )
        total = tl.dot(left, right.T, total, input_precision=PRECISION)
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    tl.store(product + rows[:, None] * n + columns[None, :], total, mask=inside)
    if r != c:
        tl.store(product + columns[:, None] * n + rows[None, :], total.T, mask=inside.T)
