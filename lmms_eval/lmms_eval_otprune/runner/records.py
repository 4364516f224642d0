"""The files of a task, its result or its failure, and when it counts as finished."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from io import TextIOBase
from pathlib import Path
from typing import Any, TextIO

from llava.eval.results.shape import TASK_RESULT, check
from llava.files import read_json as read_json
from llava.files import write_json as write_json

RESULT, FAILURE = "result.json", "failure.json"


def task_folder(job_folder: Path, task: str) -> Path:
    return job_folder / "tasks" / task


def finished(job_folder: Path, task: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """A task's result, or None unless it was made with the same settings; "all" metrics include those of the table.

    A result that cannot be read does not count: the task is scored again from its recorded answers.
    """
    result = read_json(task_folder(job_folder, task) / RESULT)
    try:
        check(result, TASK_RESULT)
    except ValueError:
        return None
    enough = (identity, {**identity, "metrics": "all"}) if "metrics" in identity else (identity,)
    return result if result.get("identity") in enough else None


def is_outdated(job_folder: Path, task: str, identity: Mapping[str, Any]) -> bool:
    """Whether a task has a result that was made with other settings."""
    return (task_folder(job_folder, task) / RESULT).exists() and finished(job_folder, task, identity) is None


def tasks_of(output: Path) -> list[str]:
    """Those that earlier commands evaluated into an output folder."""
    manifest = read_json(output / "manifest.json")
    found = manifest.get("tasks") if isinstance(manifest, dict) else None
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def failure(job_folder: Path, task: str) -> str | None:
    """Why a task failed, or None."""
    path = task_folder(job_folder, task) / FAILURE
    record = read_json(path)
    error = record.get("error") if isinstance(record, dict) else None
    return error if isinstance(error, str) else f"{path} cannot be read" if path.exists() else None


def record_failure(job_folder: Path, task: str, error: str, terminal: TextIO | TextIOBase | None = None) -> None:
    """Record why a task failed; if that cannot be written, for instance on a full disk, print it."""
    try:
        write_json(task_folder(job_folder, task) / FAILURE, {"task": task, "error": error})
    except OSError as problem:
        print(f"FAILED {task}: {error} (not recorded: {sentence(problem)})", file=terminal or sys.stderr, flush=True)


def sentence(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError):
        if error.strerror and error.filename is not None:
            return f"{error.filename}: {error.strerror}"
        return error.strerror or str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def forget_failure(job_folder: Path, task: str) -> None:
    (task_folder(job_folder, task) / FAILURE).unlink(missing_ok=True)
