"""Facts about the running process and its machine."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path


def is_main_process() -> bool:
    """Whether this process is alone or the first of its launch, as accelerate and torchrun number them."""
    return int(os.environ.get("RANK", "0")) == 0


def print_everything() -> None:
    """Let standard output and error show what the terminal's encoding lacks as escapes, instead of failing on it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def device_name(device: str) -> str:
    """A GPU's name ("cuda", "cuda:1"), or that of the CPU for every other device."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
