"""The running process and its machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import MutableMapping
from pathlib import Path

PLACE = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
PLACES = ("TORCHELASTIC_", "PET_", "ACCELERATE_", "OMPI_", "PMI_", "PMIX_", "MV2_", "SLURM_")
"""How torchrun, accelerate, MPI and SLURM name a process's place in a launch: whole names, and beginnings."""


def is_main_process() -> bool:
    """Whether this process is alone or the first of its launch, as accelerate and torchrun number them."""
    return int(os.environ.get("RANK", "0")) == 0


def forget_place(environ: MutableMapping[str, str] = os.environ) -> None:
    """Remove the variables of another launch, because of which a worker would wait for processes that never come."""
    for name in [name for name in environ if name in PLACE or name.startswith(PLACES)]:
        del environ[name]


def print_everything() -> None:
    """Print characters that the terminal's encoding lacks as escapes, instead of failing on them."""
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
