"""Triton kernels compiled to machine code on a machine without a GPU; nothing is launched."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NoGpu:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # Triton remembers what it compiled by the device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled(list):
    """What was compiled, and of each launch the kernel's name, the grid, and all arguments but tensors by name."""

    def __init__(self):
        super().__init__()
        self.launches: list[tuple[str, tuple[int, ...], dict]] = []


@contextmanager
def compiled_for(capability: int) -> Iterator[Compiled]:
    """Inside the block every launch compiles its kernel for a GPU of that compute capability (90 for 9.0), and no more;
    gives a list of what was compiled.
    """
    kernels = Compiled()
    launch = JITFunction.run

    def only_compile(self, *arguments, grid, warmup, **options):
        kernels.append(launch(self, *arguments, grid=grid, warmup=True, **options))
        named = dict(zip(self.arg_names, arguments, strict=False)) | options
        numbers = {name: value for name, value in named.items() if not isinstance(value, torch.Tensor)}
        kernels.launches.append((self.__name__, grid, numbers))

    before = dict(vars(driver))
    driver.set_active(_NoGpu(capability))
    JITFunction.run = only_compile
    try:
        yield kernels
    finally:
        JITFunction.run = launch
        vars(driver).update(before)


def bytes_spilled(kernel, folder: Path) -> int:
    """How much of a thread's registers a compiled kernel keeps in memory, in bytes."""
    path = folder / f"{kernel.hash}.cubin"
    path.write_bytes(kernel.asm["cubin"])
    told = subprocess.run([BINARIES / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", told.stdout).group(1))
