"""An environment that nothing outside a test can change, and the golden data as fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from golden import golden_root

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=1, help="how many times as many cases the fuzzed tests draw")


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
    for name in ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX"):
        monkeypatch.delenv(name, raising=False)
