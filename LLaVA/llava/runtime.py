"""Facts about the running process."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Whether this process is alone or the first of its launch, as accelerate and torchrun number them."""
    return int(os.environ.get("RANK", "0")) == 0
