"""From a command line and this machine to what is run: which models, with which pruning, on which tasks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from lmms_eval_otprune import java

from llava.model.builder import read_config, resolve_model_path
from llava.pruning import PruningConfig

from .options import Options
from .suites import SUITES, Suite

# Measured with the embedded model on two cores: larger batches gain nothing on a CPU, and one process a core with one
# thread each is faster than several threads. On a GPU the published protocol has batch 1.
CPU_BATCH_SIZE = 4
CPU_PROCESSES = 4
GPU_BATCH_SIZE = 1
SWITCH = ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX")


@dataclass(frozen=True)
class Job:
    """One model under one pruning configuration.

    Attributes
    ----------
    model : str
    pruning : PruningConfig, or None
    switch : dict
        Environment variables that say the same to a worker.
    folder : Path
        Where its results go.
    grey : bool
        Every picture is replaced by a grey one.
    """

    model: str
    pruning: PruningConfig | None
    switch: Mapping[str, str]
    folder: Path
    grey: bool = False

    @property
    def label(self) -> str:
        """For a person: the model's last name and the pruning."""
        return f"{self.model.rstrip('/').rpartition('/')[2]}, {self.folder.name}"


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first worker starts."""

    suite: Suite
    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    jobs: tuple[Job, ...]
    device: str
    dtype: str
    num_processes: int
    batch_size: int
    output: Path


def make_plan(options: Options, environ: Mapping[str, str] = os.environ) -> Plan:
    """Decide what the command line leaves open.

    Raises
    ------
    ValueError
        For a method, option or model that does not exist, or a device that is not there.
    """
    device = _device(options.device)
    suite = SUITES[options.suite or ("paper" if device == "cuda" else "mini")]
    chosen = [suite.task(name) for name in options.tasks] or list(suite.tasks)
    tasks = tuple(task for task in suite.tasks if task in chosen)
    left_out = tuple(task for task in tasks if java.needs_java(task) and not java.java_works())
    output = options.output or Path("results") / suite.name
    return Plan(
        suite=suite,
        tasks=tuple(task for task in tasks if task not in left_out),
        left_out=left_out,
        jobs=tuple(_jobs(options, suite, output, environ)),
        device=device,
        dtype=options.dtype if options.dtype != "auto" else ("float16" if device == "cuda" else "float32"),
        num_processes=options.num_processes or _processes(device, suite),
        batch_size=options.batch_size or (GPU_BATCH_SIZE if device == "cuda" else CPU_BATCH_SIZE),
        output=output,
    )


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[wanted]:
        raise ValueError(f"--device {wanted}: there is none here")
    return wanted


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes(device: str, suite: Suite) -> int:
    if device == "cuda":
        return torch.cuda.device_count()
    # Every process holds the whole model: nothing for a published checkpoint in a CPU's memory.
    return min(_cores(), CPU_PROCESSES) if device == "cpu" and suite.name == "mini" else 1


def _jobs(options: Options, suite: Suite, output: Path, environ: Mapping[str, str]) -> Iterator[Job]:
    prunings = [(None, {})] if options.unpruned else []
    for method in options.methods:
        for ratio in options.ratios:
            switch = {**method.environment(), "SUBSET_RATIO": ratio}
            if options.layer:
                switch["LAYER_INDEX"] = options.layer
            rest = {name: value for name, value in environ.items() if name not in SWITCH}
            pruning = PruningConfig.from_env({**rest, **switch})
            prunings.append((pruning, {**switch, "LAYER_INDEX": str(pruning.layer)}))
    folders: set[Path] = set()
    for model in options.models or suite.models:
        _check_model(model)
        if options.grey:
            yield Job(model, None, {}, output / _slug(model.rstrip("/").rpartition("/")[2]) / "grey", grey=True)
        for pruning, switch in prunings:
            if pruning is not None and pruning.layer:
                _check_depth(model, pruning)
            folder = output / _slug(model.rstrip("/").rpartition("/")[2]) / _pruning_slug(pruning)
            if folder in folders:
                raise ValueError(
                    f"{model} with {_pruning_slug(pruning)} is asked for twice; give them different --output"
                )
            folders.add(folder)
            yield Job(model, pruning, switch, folder)


def _check_model(model: str) -> None:
    if model in SUITES["mini"].models or Path(model).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return
    raise ValueError(f"--model {model}: neither a folder, nor a Hub id (owner/name), nor llava-mini")


def _check_depth(model: str, pruning: PruningConfig) -> None:
    """Find a layer beyond the decoder now, not after the unpruned run; a checkpoint that is not here yet waits."""
    try:
        config = read_config(resolve_model_path(model))
    except OSError:
        return
    if "num_hidden_layers" in config:
        pruning.check_depth(config["num_hidden_layers"])


def _pruning_slug(pruning: PruningConfig | None) -> str:
    if pruning is None:
        return "unpruned"
    parts = [pruning.method, f"{pruning.ratio:g}"]
    if pruning.layer:
        parts.append(f"layer{pruning.layer}")
    parts += [f"{name}{value}" for name, value in sorted(pruning.options.items())]
    return _slug("-".join(parts))


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text) or "model"
