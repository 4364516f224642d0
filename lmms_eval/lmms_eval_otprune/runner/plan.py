"""Decides what is run, from the command line and the machine: which models, with which pruning, on which tasks."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llava import hf
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import read_config, resolve_model_path
from llava.model.checkpoint import EMBEDDED_MODELS
from llava.pruning import PruningConfig
from llava.pruning.methods.ocvtp.variables import translated
from lmms_eval_otprune.models import java
from lmms_eval_otprune.models.families import wrapper_of

from . import records
from .options import OFF, Options
from .suites import SUITES, Suite, expanded

# Measured with the embedded model on two cores: unpruned prompts take as long 16 at a time as 8 at a time, and pruned
# ones, which are shorter and mostly decoded, a sixth less. One process a core with one thread each is faster than
# several threads. On a GPU the published protocol has batch 1.
CPU_BATCH_SIZE = 8
CPU_PRUNED_BATCH_SIZE = 16
CPU_PROCESSES = 4
GPU_BATCH_SIZE = 1
CPU_VISUAL_CACHE = 8
"""GiB: encoding an image takes longer than reading it from disk. The embedded suite needs 1, with every method 2."""
SWITCH = ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX")
LONGEST_NAME = 200


@dataclass(frozen=True)
class Job:
    """One model under one pruning configuration.

    Attributes
    ----------
    model : str
    pruning : PruningConfig, or None
    folder : Path
        Of its results.
    grey : bool
        Replace every image by a grey one.
    wrapper : str, or None
        The lmms-eval wrapper of a transformers model.
    """

    model: str
    pruning: PruningConfig | None
    folder: Path
    grey: bool = False
    wrapper: str | None = None

    @property
    def switch(self) -> dict[str, str]:
        """The pruning as environment variables."""
        return {} if self.pruning is None else self.pruning.to_env()

    @property
    def label(self) -> str:
        """The model and the pruning, as their folders are named."""
        return f"{self.folder.parent.name}, {self.folder.name}"


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first worker starts.

    Attributes
    ----------
    batch_size, pruned_batch_size : int
        The latter for rows that drop tokens before the decoder.
    visual_cache : int or None
        Bytes of encoded images on disk; 0: in memory only, per process; None: no cache.
    encoded_images : Path
        Where they are during the run, a folder per machine.
    """

    suite: Suite
    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    jobs: tuple[Job, ...]
    device: str
    dtype: str
    num_processes: int
    batch_size: int
    pruned_batch_size: int
    visual_cache: int | None
    encoded_images: Path
    output: Path


def make_plan(options: Options, environ: Mapping[str, str] = os.environ) -> Plan:
    """Decide what the command line leaves open.

    Raises
    ------
    ValueError
        For a method, option or model that does not exist, or a device that is not there.
    """
    environ = translated(environ)
    device = _device(options.device)
    if options.conv_template not in ("auto", *conv_templates):
        raise ValueError(f"--conv-template {options.conv_template}: allowed are auto, {', '.join(conv_templates)}")
    suite = SUITES[options.suite or ("paper" if device == "cuda" else "mini")]
    output = options.output or Path("results") / suite.name
    chosen = [suite.task(name) for name in expanded(options.tasks)] or list(suite.tasks)
    # What an earlier command evaluated here stays in the table.
    suite = replace(suite, tasks=tuple(dict.fromkeys([*suite.tasks, *records.tasks_of(output), *chosen])))
    tasks = tuple(task for task in suite.tasks if task in chosen)
    if options.model_base is not None:
        _check_model(options.model_base, "--model-base")
    left_out = tuple(task for task in tasks if java.needs_java(task) and not java.java_works())
    return Plan(
        suite=suite,
        tasks=tuple(task for task in tasks if task not in left_out),
        left_out=left_out,
        jobs=tuple(_jobs(options, suite, output, environ)),
        device=device,
        dtype=options.dtype if options.dtype != "auto" else ("float16" if device == "cuda" else "float32"),
        num_processes=options.num_processes or _processes(device, suite),
        batch_size=options.batch_size or (GPU_BATCH_SIZE if device == "cuda" else CPU_BATCH_SIZE),
        pruned_batch_size=options.batch_size or (GPU_BATCH_SIZE if device == "cuda" else CPU_PRUNED_BATCH_SIZE),
        visual_cache=_visual_cache(options, device),
        encoded_images=output / "encoded-images" / str(options.machine_rank),
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
    # Every process holds the whole model, and memory seldom has room for several published checkpoints.
    return min(_cores(), CPU_PROCESSES) if device == "cpu" and suite.embedded else 1


def _visual_cache(options: Options, device: str) -> int | None:
    if options.visual_cache == OFF:
        return None
    gib = (0 if device == "cuda" else CPU_VISUAL_CACHE) if options.visual_cache is None else options.visual_cache
    return int(gib * 2**30)


def _jobs(options: Options, suite: Suite, output: Path, environ: Mapping[str, str]) -> Iterator[Job]:
    prunings: list[PruningConfig | None] = [None] if options.unpruned else []
    for method in suite.methods if options.methods is None else options.methods:
        prunings += _prunings(method, options, environ)
    names: dict[str, str] = {}
    for model in map(hf.path_of, options.models or suite.models):
        _check_model(model)
        if Path(model).is_dir():
            # Without .., and the same from every working folder.
            model = os.path.abspath(model)
        name = folder_name(get_model_name_from_path(model))
        _check_owner(output / name, model)
        if name in names:
            raise ValueError(
                f"{model} is given twice"
                if names[name] == model
                else f"{names[name]} and {model} would both be {name} in the table: give each its own --output"
            )
        names[name] = model
        wrapper = _wrapper(model)
        others = {
            "--grey": options.grey,
            "--model-base": options.model_base,
            "--num-machines": options.num_machines > 1,
        }
        for option in (name for name, given in others.items() if wrapper and given):
            raise ValueError(f"{option} is for LLaVA's own checkpoints, not {model}")
        if options.grey:
            yield Job(model, None, output / name / "grey", grey=True)
        folders: set[Path] = set()
        for pruning in prunings:
            if pruning is not None and pruning.layer != 0:
                _check_depth(model, pruning)
            folder = output / name / _pruning_folder(pruning)
            if folder in folders:
                raise ValueError(f"{folder.name} is asked for twice")
            folders.add(folder)
            yield Job(model, pruning, folder, wrapper=wrapper)


def _prunings(text: str, options: Options, environ: Mapping[str, str]) -> list[PruningConfig]:
    """The configurations of a method: one per ratio, or a single one whose options set the budget."""
    stated = {setting.partition("=")[0].lower() for setting in text.split(":")[1:]}
    if options.layer is not None and "layer" not in stated:
        text = f"{text}:layer={options.layer}"
    try:
        if "ratio" in stated:
            return [PruningConfig.from_text(text, None, environ)]
        try:
            return [PruningConfig.from_text(text, ratio, environ) for ratio in options.ratios]
        except ValueError as refusal:
            # The options or the layer may set the budget.
            try:
                return [PruningConfig.from_text(text, None, environ)]
            except ValueError:
                raise refusal from None
    except ValueError as error:
        # Its options are named by the configuration; an unknown name is not.
        named = str(error) if str(error).startswith(text) else f"{text}: {error}"
        raise ValueError(f"--method {named}") from None


def _check_model(model: str, option: str = "--model") -> None:
    if model in EMBEDDED_MODELS or Path(model).is_dir() or _is_hub_id(model):
        return
    names = ", ".join((*EMBEDDED_MODELS, hf.EMBEDDED))
    raise ValueError(f"{option} {model}: neither a folder, nor a Hub id (owner/name), nor one of {names}")


def _wrapper(model: str) -> str | None:
    """The wrapper of a transformers model; one whose configuration is not downloaded yet is taken for a LLaVA."""
    try:
        return wrapper_of(read_config(resolve_model_path(model)))
    except (OSError, ValueError):
        return None


def _check_owner(folder: Path, model: str) -> None:
    """Refuse to overwrite the results of another model of the same name."""
    for path in folder.glob("*/results.json"):
        found = records.read_json(path)
        other = found.get("model") if isinstance(found, dict) else None
        if not isinstance(other, str) or other == model:
            continue
        here = Path(other).is_dir()
        if here and Path(model).is_dir() and Path(other).samefile(model):
            continue
        # A folder that is gone has moved.
        if here or _is_hub_id(other):
            raise ValueError(f"{folder} holds the results of {other}: give {model} its own --output")


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None


def _check_depth(model: str, pruning: PruningConfig) -> None:
    """Refuse now, not after the unpruned run, what this decoder cannot do; skipped if it is not downloaded yet."""
    try:
        config = read_config(resolve_model_path(model))
    except OSError:
        return
    if "num_hidden_layers" not in config:
        return
    try:
        pruning.schedule(config["num_hidden_layers"])
    except ValueError as error:
        raise ValueError(f"{model} with {_pruning_folder(pruning)}: {error}") from None


def _pruning_folder(pruning: PruningConfig | None) -> str:
    if pruning is None:
        return "unpruned"
    parts = [pruning.method]
    if pruning.ratio is not None:
        parts.append(f"{pruning.ratio:g}")
    if pruning.layer:
        parts.append(f"layer{pruning.layer}")
    parts += [f"{name}{value}" for name, value in sorted(pruning.options.items())]
    return folder_name("-".join(parts))


def folder_name(text: str) -> str:
    """A valid name of a single folder: never "..", hidden, empty, or too long for a file system."""
    name = re.sub(r"[^\w.-]+", "_", text).lstrip(".") or "unnamed"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 4]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
