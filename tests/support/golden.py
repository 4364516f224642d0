"""Where golden data lies: all of it beside the project when it is there, else the small copy kept with the tests."""

from __future__ import annotations

import os
from pathlib import Path

SMALL_COPY = Path(__file__).parents[1] / "golden"
FULL_SET = Path(__file__).parents[3] / "shared" / "golden"


def golden_root() -> Path:
    """The folder that holds ``llava`` and ``pruning``; LLAVA_GOLDEN=small asks for the small copy."""
    if os.environ.get("LLAVA_GOLDEN") == "small" or not FULL_SET.is_dir():
        return SMALL_COPY
    return FULL_SET
