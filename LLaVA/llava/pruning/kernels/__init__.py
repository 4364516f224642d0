"""Fast versions of the selections, each with the signature of the plain PyTorch one that it stands in for.

The plain version is the specification. It runs wherever no fast one serves: for a matrix that is not float32, where a
gradient is wanted, on a GPU without Triton, and where a kernel cannot be launched. Tokens may have any floating dtype;
both versions read them as float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch

EXHAUSTED = 1e-6
"""Share of a kernel's largest diagonal entry below which a gain is rounding error."""

SMALLEST_NORM = 1e-19
"""Norm of a feature column below which it fades to zero: squares so small leave float32's range, and with them the norm
that would bring the column to length 1."""

_ON_GPU = {
    "greedy_select": "greedy",
    "max_min_select": "max_min",
    "facility_select": "facility",
    "ot_kernel": "symmetric",
    "cosine_similarity": "symmetric",
}
_ON_CPU = dict.fromkeys(
    ("greedy_select", "max_min_select", "facility_select", "gram", "ot_select", "cosine_similarity"), "host"
)
_READS_AS_FLOAT32 = ("ot_kernel", "ot_select", "cosine_similarity")
_UNUSABLE: set[tuple[str, torch.device]] = set()


def gram(x: torch.Tensor) -> torch.Tensor:
    """``x x^T`` of every image, by half the work where possible: (B, N, D), floating -> (B, N, N), same dtype."""
    product = fused("gram", x)
    return x @ x.mT if product is None else product


def fused(name: str, tensor: torch.Tensor, *arguments) -> torch.Tensor | None:
    """What the fast version of the function ``name`` makes of its arguments; None where the plain one has to serve.

    A GPU kernel that cannot be compiled or launched is not tried again: it warns, once.
    """
    function = fast_version(name, tensor)
    if function is None:
        return None
    try:
        return function(tensor, *arguments)
    except Exception as error:
        # Triton, its compiler and the driver say what they lack in many ways. The plain version needs no less memory.
        if tensor.device.type == "cpu" or isinstance(error, torch.OutOfMemoryError):
            raise
        _UNUSABLE.add((name, tensor.device))
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"{name} runs without its fused kernel on {tensor.device} ({reason})", stacklevel=3)
        return None


def fast_version(name: str, tensor: torch.Tensor) -> Callable | None:
    """The fast version of the function ``name`` for input like ``tensor``, if there is one."""
    readable = tensor.is_floating_point() if name in _READS_AS_FLOAT32 else tensor.dtype == torch.float32
    if not readable or (tensor.requires_grad and torch.is_grad_enabled()):
        return None
    if tensor.device.type == "cpu":
        modules = _ON_CPU
    elif (
        tensor.device.type == "cuda" and (name, tensor.device) not in _UNUSABLE and _triton_serves(tensor.device.index)
    ):
        modules = _ON_GPU
    else:
        return None
    return getattr(import_module(f"{__name__}.{modules[name]}"), name) if name in modules else None


def multiprocessors(device: torch.device) -> int:
    """How many thread blocks a GPU runs side by side; 1 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _triton_serves(device: int) -> bool:
    """Whether a GPU's kernels can be written in Triton: an NVIDIA one since Ampere, beside Triton 3.3 or later."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        import triton
        from triton.runtime import driver

        driver.active.get_current_target()
    except ImportError:
        return False
    except Exception as error:
        # Triton builds its launcher with the machine's C compiler, and says what it lacks in many ways.
        warnings.warn(f"Triton does not work here ({error}): tokens are selected without fused kernels", stacklevel=2)
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
