"""Where golden data lies, and an environment that nothing outside a test can change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SMALL_COPY = Path(__file__).parent / "golden"
FULL_SET = Path(__file__).parents[2] / "shared" / "golden"


def golden_root() -> Path:
    """The full golden data where it lies beside the project, else the small copy kept with the tests."""
    return FULL_SET if FULL_SET.is_dir() else SMALL_COPY


@pytest.fixture(scope="session")
def golden_llava() -> Path:
    """Outputs of the original LLaVA: checkpoints, images, and what they give."""
    return golden_root() / "llava"


@pytest.fixture(scope="session")
def golden_pruning() -> Path:
    """Selections made by the published pruning code."""
    return golden_root() / "pruning"


@pytest.fixture(autouse=True)
def _switch_is_off(monkeypatch):
    """No test sees a pruning switch of the shell it was started from."""
    for name in [name for name in os.environ if name in ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX")]:
        monkeypatch.delenv(name)
