"""Small result folders as a run leaves them, with per-sample logs whose scores are what the results say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STAMP = "20260101_000000"
TOTAL = 576
DEFAULTS = {"otprune": {"gamma": 0.01}, "random": {"seed": 0}}
TASKS = ("mini_gqa", "mini_pope")


def write_run(
    folder: Path, jobs: dict[str, dict[str, Any]], tasks: tuple[str, ...] = ("mini_gqa", "mini_pope")
) -> Path:
    """A whole run's folder.

    Parameters
    ----------
    folder : Path
    jobs : dict
        Folder name -> keyword arguments of `write_job`.
    tasks : tuple of str
        What the run was asked for.
    """
    contents = [write_job(folder / "llava-mini" / name, **job) for name, job in jobs.items()]
    manifest = {"tasks": list(tasks), "jobs": [f"llava-mini/{name}" for name in jobs]}
    _write(folder / "manifest.json", manifest)
    _write(folder / "results.json", {"runs": contents})
    return folder


def write_job(
    folder: Path,
    logs: dict[str, list[dict[str, Any]]],
    metrics: dict[str, dict[str, float]],
    method: str | None = None,
    kept: float = TOTAL,
    ratio: float | None = 0.098,
    layer: int = 0,
    options: dict[str, Any] | None = None,
    versions: dict[str, str] | None = None,
    data: str = "1-aaaa",
    seconds: float = 0.1,
    **changes: Any,
) -> dict[str, Any]:
    """One configuration's folder; returns its results.

    Parameters
    ----------
    folder : Path
    logs : dict
        Task -> samples as lmms-eval logs them, ``doc_id`` and ``target`` left out.
    metrics : dict
        Task -> its metrics.
    seconds : float
        From a prompt to its answer.
    **changes
        Further keys of the results.
    """
    pruning = None
    if method:
        given = options or {}
        chosen = {**DEFAULTS.get(method, {}), **given}
        pruning = {"method": method, "ratio": ratio, "layer": layer, "options": chosen, "set_options": sorted(given)}
    results = {}
    for task, samples in logs.items():
        lines = [{"doc_id": number, "target": "t", **sample} for number, sample in enumerate(samples)]
        log = folder / "tasks" / task / "llava-mini" / f"{STAMP}_samples_{task}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        _write(folder / "tasks" / task / "result.json", {"task": task, "identity": {"data": data, "seed": 1234}})
        results[task] = {
            "metrics": metrics[task],
            "samples": len(samples),
            "throughput": {"avg_latency": seconds},
            "date": STAMP,
        }
    content = {
        "suite": "mini",
        "model": "llava-mini",
        "trained": True,
        "pruning": pruning,
        "grey": False,
        "limit": None,
        "visual_tokens": {
            "images": 9,
            "total": {"min": TOTAL, "mean": float(TOTAL), "max": TOTAL},
            "kept": {"min": kept, "mean": float(kept), "max": kept},
            "per_layer": [float(kept)] * 4,
            "flops_ratio": {"literature": kept / TOTAL, "exact": 0.3 + 0.7 * kept / TOTAL},
        },
        "tasks": results,
        "failed": {},
        "left_out": [],
        **changes,
    }
    _write(folder / "results.json", content)
    manifest = {"versions": versions or {"torch": "2.6"}, "dtype": "float32", "model_fingerprint": "a/b/c/d/e"}
    _write(folder / "manifest.json", manifest)
    return content


def answers(task: str, right: list[bool]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Samples and metrics of "mini_gqa" or "mini_pope", by which questions are answered right; POPE's are all "yes"."""
    share = sum(right) / len(right)
    if task == "mini_gqa":
        return [{"exact_match": float(one)} for one in right], {"exact_match": share}
    records = [{"ground_truth": "yes", "prediction": "yes" if one else "no", "question_id": "1"} for one in right]
    return [{"pope_f1_score": record} for record in records], {"pope_f1_score": 2 * share / (1 + share)}


def job(right: dict[str, list[bool]], **settings: Any) -> dict[str, Any]:
    """Keyword arguments of `write_job` for a configuration that answers as told."""
    made = {task: answers(task, told) for task, told in right.items()}
    return {
        "logs": {task: samples for task, (samples, _) in made.items()},
        "metrics": {task: metrics for task, (_, metrics) in made.items()},
        **settings,
    }


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
