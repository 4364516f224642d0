"""What a run leaves on the disk, file by file, and when a task counts as done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULT, FAILURE = "result.json", "failure.json"


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The file's content, or None when there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def task_folder(job_folder: Path, task: str) -> Path:
    return job_folder / "tasks" / task


def finished(job_folder: Path, task: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """A task's result, if it is there and was made with the same settings; all metrics serve for the table's, too."""
    result = read_json(task_folder(job_folder, task) / RESULT)
    enough = (identity, {**identity, "metrics": "all"}) if "metrics" in identity else (identity,)
    return result if isinstance(result, dict) and result.get("identity") in enough else None


def failure(job_folder: Path, task: str) -> str | None:
    """Why a task failed, or None."""
    record = read_json(task_folder(job_folder, task) / FAILURE)
    return record["error"] if isinstance(record, dict) else None


def record_failure(job_folder: Path, task: str, error: str) -> None:
    write_json(task_folder(job_folder, task) / FAILURE, {"task": task, "error": error})


def forget_failure(job_folder: Path, task: str) -> None:
    (task_folder(job_folder, task) / FAILURE).unlink(missing_ok=True)
