"""The feature matrices behind the golden selections, rebuilt from their recipes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def load_features(folder: Path, key: str, dtype: str = "float32") -> torch.Tensor:
    """The matrix ``<kind>/<n>x<d>``, checked against its digest."""
    recipe = json.loads((folder / "feature_inputs.json").read_text())[key]
    matrix = draw_features(recipe["recipe"], recipe["seed"], recipe["n"], recipe["d"])
    assert hashlib.sha256(matrix.tobytes()).hexdigest() == recipe["sha256_float32"]
    return torch.from_numpy(matrix).to(DTYPES[dtype])


def draw_features(kind: str, seed: int, n: int, d: int) -> np.ndarray:
    """(n, d) float32 of one of the kinds "gaussian", "clustered" (with exact duplicates) and "heavy" (Student-t)."""
    rng = np.random.default_rng(seed)
    if kind == "gaussian":
        return rng.standard_normal((n, d)).astype(np.float32)
    if kind == "clustered":
        centres, labels = rng.standard_normal((10, d)), rng.integers(0, 10, size=n)
        a, b, noise = rng.standard_normal((n, 8)), rng.standard_normal((8, d)), rng.standard_normal((n, d))
        x = 2 * centres[labels]
        for r in range(8):
            x = x + 0.5 * (a[:, r, None] * b[r])
        x = x + 0.1 * noise
        copies = max(1, n // 50)
        source, target = rng.integers(0, n, size=copies), rng.integers(0, n, size=copies)
        for s, t in zip(source, target, strict=True):
            x[t] = x[s]
        return x.astype(np.float32)
    z = [rng.standard_normal((n, d)) for _ in range(4)]
    x = z[0] / np.sqrt((z[1] * z[1] + z[2] * z[2] + z[3] * z[3]) / 3)
    columns = max(1, d // 64)
    x[:, :columns] = x[:, :columns] * 30
    return x.astype(np.float32)
