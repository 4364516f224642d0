"""Reads result folders, and checks whether their runs may be in one table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.benchmarks import DOCUMENTS, PAPER, Benchmark
from llava.eval.results.shape import MANIFEST, RESULTS, WHOLE_RUN, check
from llava.files import read_json


@dataclass(frozen=True)
class Run:
    """The results of one model under one pruning configuration.

    Attributes
    ----------
    content : dict
        Its ``results.json`` (`llava.eval.results.shape.Results`).
    folder : Path, or None
        Where its manifest and per-sample logs are; None where only the whole run's ``results.json`` is left.
    manifest : dict
        Its ``manifest.json``, empty where there is none.
    """

    content: Mapping[str, Any]
    folder: Path | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> Mapping[str, Any]:
        return self.content["tasks"]

    @property
    def mini(self) -> bool:
        return self.content["suite"] in ("mini", DOCUMENTS)

    @property
    def group(self) -> str:
        """The benchmarks that it is about, as far as there are embedded ones."""
        return DOCUMENTS if self.content["suite"] == DOCUMENTS else PAPER

    @property
    def name(self) -> str:
        """Model and folder, for a person."""
        pruning = self.content["pruning"]
        last = self.folder.name if self.folder else pruning["method"] if pruning else "unpruned"
        return f"{short_name(self.content['model'])}/{last}"

    def log(self, column: Benchmark) -> Path | None:
        """The per-sample log that a column's score is from, or None."""
        task = column.task_in(self.tasks)
        if self.folder is None or task is None:
            return None
        # A task that was evaluated again has an older log, too.
        stamp = self.tasks[task].get("date", "*")
        return min((self.folder / "tasks" / task).glob(f"*/{stamp}_samples_{task}.jsonl"), default=None)

    def metadata(self) -> dict[str, str]:
        """What a score depends on besides model and pruning, as far as it is recorded: name -> value."""
        # code and weights: see lmms_eval_otprune's fingerprint
        parts = str(self.manifest.get("model_fingerprint") or "").split("/")
        weights, code, _, attention, template = parts[:5] if len(parts) >= 5 else (None,) * 5
        identity = self._identity()
        found = {
            "suite": self.content["suite"],
            "limit on the documents": self.content["limit"] or "none",
            "data": identity.get("data"),
            "seed": identity.get("seed"),
            "dtype": self.manifest.get("dtype"),
            "device": self.manifest.get("device_type"),
            "code of the model and the methods": code,
            "attention": attention,
            "conversation template": template,
            f"weights of {short_name(self.content['model'])}": weights,
        }
        found |= {f"version of {name}": version for name, version in self.manifest.get("versions", {}).items()}
        return {name: str(value) for name, value in found.items() if value is not None}

    def _identity(self) -> Mapping[str, Any]:
        files = sorted((self.folder / "tasks").glob("*/result.json")) if self.folder else ()
        results = (read_json(path) for path in files)
        found = (result["identity"] for result in results if isinstance(result, dict) and "identity" in result)
        return next((identity for identity in found if isinstance(identity, dict)), {})


def read_runs(folders: Iterable[Path | str], unreadable: list[str] | None = None) -> list[Run]:
    """Read result folders: a whole run's, or that of one model under one pruning configuration.

    ``unreadable`` receives a sentence on each configuration of a whole run that cannot be read, and the others are
    returned; without it, and for a folder that holds no results, it is a `ValueError`.
    """
    runs: list[Run] = []
    for folder in map(Path, folders):
        path = folder / "results.json"
        if not path.exists():
            raise ValueError(f"{folder} is no result folder: it has no results.json")
        content = _object(path)
        if "runs" in content:
            with _reading(path):
                check(content, WHOLE_RUN)
            runs += _jobs(folder, content["runs"], unreadable)
        elif "tasks" in content:
            runs.append(_run(path, content, folder))
        else:
            raise ValueError(f"{path} is no run's: it has neither runs nor tasks")
    return runs


def unfinished(folders: Iterable[Path | str]) -> list[str]:
    """Sentences on what result folders lack: configurations without results, tasks without results or samples."""
    lacking = []
    for folder in map(Path, folders):
        jobs = [folder / job for job in _manifest(folder).get("jobs", ())]
        lacking += [f"{job} has no results yet" for job in jobs if not (job / "results.json").exists()]
    for run in read_runs(folders, unreadable=[]):
        failed = run.content["failed"]
        if not run.tasks and not failed:
            lacking.append(f"{run.name} has no finished task")
            continue
        planned = set(_manifest(run.folder.parent.parent).get("tasks", ())) if run.folder else set()
        empty = [task for task, result in run.tasks.items() if result.get("samples") == 0]
        reasons = [(task, "failed") for task in failed] + [(task, "has no samples") for task in empty]
        reasons += [(task, "is not finished") for task in sorted(planned - set(run.tasks) - set(failed))]
        lacking += [f"{run.name}: {task} {reason}" for task, reason in reasons]
    return lacking


def differences(runs: Sequence[Run]) -> dict[str, dict[str, list[str]]]:
    """Metadata that differs between runs: name -> value -> runs that have it. What a run lacks is not compared."""
    seen: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for name, value in run.metadata().items():
            seen.setdefault(name, {}).setdefault(value, []).append(run.name)
    return {name: values for name, values in seen.items() if len(values) > 1}


def described(values: Mapping[str, Sequence[str]]) -> str:
    """One of the `differences` in words."""
    return "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())


def check_alike(runs: Sequence[Run]) -> None:
    """Refuse runs of different versions, data or settings: a `ValueError` names the first difference."""
    found = differences(runs)
    if not found:
        return
    name, values = next(iter(found.items()))
    shown = "; ".join(f"{value}: {names[0]}" for value, names in values.items())
    others = f" ({len(found) - 1} more differences)" if len(found) > 1 else ""
    raise ValueError(f"the runs are not alike in {name} ({shown}){others}; --allow-mixed shows them together, marked")


def short_name(model: str) -> str:
    """The last part of a folder or hub id."""
    return model.rstrip("/").rpartition("/")[2]


def _jobs(folder: Path, contents: Sequence[Any], unreadable: list[str] | None) -> list[Run]:
    """The runs in a whole run's results, each with the folder whose results.json is the same."""
    places = [(folder / job, read_json(folder / job / "results.json")) for job in _manifest(folder).get("jobs", ())]
    runs = []
    for content in contents:
        place = next((place for place, own in places if own == content), None)
        try:
            runs.append(_run((place or folder) / "results.json", content, place))
        except ValueError as error:
            if unreadable is None:
                raise
            unreadable.append(str(error))
    return runs


def _run(path: Path, content: Any, folder: Path | None) -> Run:
    with _reading(path):
        check(content, RESULTS)
    return Run(content, folder, {} if folder is None else _manifest(folder))


def _manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, empty where it has none."""
    path = folder / "manifest.json"
    content = _object(path) if path.exists() else {}
    with _reading(path):
        check(content, MANIFEST)
    return content


def _object(path: Path) -> dict[str, Any]:
    with _reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise errors of the block as one sentence that names the file."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
