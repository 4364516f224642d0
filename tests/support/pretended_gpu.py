"""GPUs that are not there: tensors that say they lie on ``cuda:0`` or ``cuda:1`` and are computed on the CPU.

What a GPU would refuse is refused, tensors of two devices in one operation above all, and each time that the host
would wait for a device is counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from llava.pruning import kernels
from no_waiting import makes_the_host_wait

GPUS = GPU, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
CPU = torch.device("cpu")
COPY = torch.ops.aten.copy_.default


class _OnGpu(torch.Tensor):
    """The face of a CPU tensor, which is in ``inner``."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )

    def __init__(self, inner: torch.Tensor, device: torch.device):
        self.inner = inner

    def __repr__(self) -> str:
        return f"{self.inner!r} on {self.device}"

    def tolist(self):
        return self.cpu().tolist()

    def __getitem__(self, index):
        return super().__getitem__(_with_tensors(index, self.device))

    def __setitem__(self, index, value):
        super().__setitem__(_with_tensors(index, self.device), value)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise RuntimeError("outside of the pretended GPU's block")


def _with_tensors(index, device: torch.device):
    """An index whose lists are brought to the GPU, as PyTorch does."""
    if isinstance(index, list):
        return torch.tensor(index).to(device)
    return tuple(_with_tensors(part, device) for part in index) if isinstance(index, tuple) else index


class PretendedGpu(TorchDispatchMode):
    """Computes for the tensors on it, or on a second one.

    Attributes
    ----------
    waits : list of str
        The operations at which the host would have waited.
    """

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = [tensor.device if isinstance(tensor, _OnGpu) else CPU for tensor in tensors]
        gpus = [place for place in places if place != CPU]
        copies = operation in (torch.ops.aten._to_copy.default, COPY)
        if operation is torch.ops.aten.index.Tensor and places[0] != CPU and CPU in places:
            self.waits.append("copied to the GPU")  # indices on the CPU are brought over
        elif gpus and not copies:
            # A number on the CPU may be read by a kernel, and may be an index of a tensor on the GPU.
            others = [place for tensor, place in zip(tensors, places, strict=True) if place != CPU or tensor.ndim]
            if len(set(others)) > 1:
                named = sorted("on the CPU" if place == CPU else f"on {place}" for place in set(others))
                raise RuntimeError(f"{operation} of tensors {' and '.join(named)}")
        target = kwargs.get("device")
        if target is not None:
            target = torch.device(target)
            kwargs["device"] = CPU
            place = GPU if target.type == "cuda" and target.index is None else target
        else:
            place = gpus[0] if gpus else CPU
        if operation is COPY:
            place = places[0]
        # A copy waits for all that was launched before, whichever way it goes, unless it is told not to.
        non_blocking = kwargs.get("non_blocking", operation is COPY and len(args) > 2 and args[2])
        crosses = copies and CPU in {*places, place} and len({*places, place}) > 1 and tensors[0].numel() > 0
        if crosses and not (place != CPU and non_blocking):
            self.waits.append(f"copied to the {'host' if place == CPU else 'GPU'}")
        elif gpus and makes_the_host_wait(operation, args):
            self.waits.append(str(operation))
        args, kwargs = tree_map_only(_OnGpu, lambda tensor: tensor.inner, (args, kwargs))
        operation = ONLY_ON_GPUS.get(operation, operation)
        found = operation(*args, **kwargs)
        return tree_map_only(torch.Tensor, lambda tensor: _OnGpu(tensor, place), found) if place in GPUS else found


def _gru_cell(inputs, hidden, state, input_bias=None, hidden_bias=None):
    """What a GPU has one kernel for: gates (B, 3 H) and the state (B, H) -> the next state, and what training needs."""
    inputs = inputs if input_bias is None else inputs + input_bias
    hidden = hidden if hidden_bias is None else hidden + hidden_bias
    (reset, update, new), (own_reset, own_update, own_new) = inputs.chunk(3, 1), hidden.chunk(3, 1)
    update = (update + own_update).sigmoid()
    new = (new + (reset + own_reset).sigmoid() * own_new).tanh()
    return new + update * (state - new), state.new_empty(0)


ONLY_ON_GPUS = {torch.ops.aten._thnn_fused_gru_cell.default: _gru_cell}


def _tensor(data, *, device=None, **options) -> torch.Tensor:
    """`torch.tensor`, which goes past what a dispatch mode sees."""
    if device is None:  # inside a device's block it is made there
        modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
        device = modes[-1].device if modes else "cpu"
    data = tree_map_only(_OnGpu, lambda tensor: tensor.tolist(), data)
    return _make_tensor(data, device="cpu", **options).to(device)


_make_tensor = torch.tensor


class _Event:
    """A moment on the host's clock: what was launched is done."""

    def __init__(self, enable_timing: bool = False):
        self._moment = 0.0

    def record(self, stream=None) -> None:
        self._moment = time.perf_counter()

    def elapsed_time(self, later: _Event) -> float:
        return 1e3 * (later._moment - self._moment)


NAME, PEAK = "a pretended GPU", 7 * 2**20
CUDA = {
    "is_available": lambda: True,
    "get_device_name": lambda device=None: NAME,
    "synchronize": lambda device=None: None,
    "current_stream": lambda device=None: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "max_memory_allocated": lambda device=None: PEAK,
    "Event": _Event,
}


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Inside the block "cuda" is a device, and "cuda:1" another.

    Selection goes by its plain versions: Triton needs a real one.
    """
    torch._C._ensureCUDADeviceGuardSet()  # what does nothing where there is no GPU
    with (
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        # Tensors made in inference mode would have to be told so.
        mock.patch.object(torch._C, "_InferenceMode", lambda mode: torch.no_grad()),
        mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True),
        mock.patch.object(torch, "tensor", _tensor),
        mock.patch.object(kernels, "_triton_serves", lambda device: False),
        torch.no_grad(),
        PretendedGpu() as gpu,
    ):
        yield gpu


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Inside the block `torch.cuda` answers as with a GPU, for what measures one."""
    with mock.patch.multiple(torch.cuda, **CUDA):
        yield
