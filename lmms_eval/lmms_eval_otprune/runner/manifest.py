"""Records what a result was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava.runtime import device_name

if TYPE_CHECKING:
    from lmms_eval_otprune.models.rows import RowsInTurn

_PACKAGES = (
    "llava",
    "lmms-eval-otprune",
    "lmms-eval",
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "pillow",
    "numpy",
)


def describe_machine(lm: RowsInTurn, model: str) -> dict[str, Any]:
    """Device, types, versions and code of the process that evaluates, and the model it has loaded."""
    return {
        "device": device_name(str(lm.device)),
        "device_type": lm.device.type,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "batch_size": lm.batch_size,
        "processes": lm.world_size,
        "threads": torch.get_num_threads(),
        "model_fingerprint": lm.model_fingerprint,
        "conv_template": lm.conv_template,
        "trained": _is_trained(model, lm.config),
        "pruning": lm.pruning and lm.pruning.to_dict(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "cuda": torch.version.cuda if lm.device.type == "cuda" else None,
        "platform": platform.platform(),
        "git_commit": git_commit(),
    }


def _is_trained(model: str, config: Any) -> bool:
    """False for an untrained placeholder: its configuration says so, or it is embedded without a training record."""
    from llava.model.checkpoint import EMBEDDED_MODELS, resolve_model_path

    if getattr(config, "untrained", False):
        return False
    return model not in EMBEDDED_MODELS or (Path(resolve_model_path(model)) / "training.json").exists()


def git_commit() -> str | None:
    """The commit this code was checked out at, marked when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        # An installed copy inside somebody else's repository is not that repository's code.
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        return f"{commit} with changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
