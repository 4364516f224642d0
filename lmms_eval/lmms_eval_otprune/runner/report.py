"""Writes results.json and manifest.json of each job, and the table of all of them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import transformers

from llava.eval.results.shape import FORMAT
from llava.eval.table import Table, build_table, load_runs
from llava.files import atomic_write
from lmms_eval_otprune.models.token_counts import merged_summary

from . import records
from .manifest import git_commit
from .options import Options
from .plan import Job, Plan

IMAGES = 8
"""Of each benchmark, for the distances in the report."""
TABLES = {"markdown": "table.md", "csv": "table.csv", "json": "table.json", "html": "table.html", "latex": "table.tex"}


def collect(
    job: Job, plan: Plan, options: Options, identities: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Write a job's ``results.json`` and ``manifest.json``, with the task results of earlier commands.

    Returns
    -------
    dict, or None without images
        The `summary` of visual tokens over all tasks.
    """
    wanted = {task: _wanted(identities[task], task in plan.tasks) for task in plan.suite.tasks}
    results = {task: records.finished(job.folder, task, identity) for task, identity in wanted.items()}
    done = {task: result for task, result in results.items() if result}
    outdated = [task for task, identity in wanted.items() if records.is_outdated(job.folder, task, identity)]
    if outdated:
        print(f"{job.label}: {', '.join(outdated)} had other settings or another version, and are left out", flush=True)
    machine = records.read_json(job.folder / "machine.json")
    machine = machine if isinstance(machine, dict) else {}
    pruning = machine.pop("pruning", None)
    if job.pruning is not None:
        pruning = {**(pruning or job.pruning.to_dict()), "set_options": sorted(job.pruning.options)}
    visual_tokens = merged_summary([result["visual_tokens"] for result in done.values() if result["visual_tokens"]])
    common = {
        "format": FORMAT,
        "suite": plan.suite.name,
        "model": job.model,
        "wrapper": job.wrapper,
        "trained": machine.get("trained", True),
        "pruning": pruning,
        "grey": job.grey,
        "limit": options.limit,
        "visual_tokens": visual_tokens,
    }
    records.write_json(
        job.folder / "results.json",
        {
            **common,
            "tasks": {
                task: {name: value for name, value in result.items() if name not in ("identity", "task")}
                for task, result in done.items()
            },
            "failed": {task: reason for task in plan.suite.tasks if (reason := records.failure(job.folder, task))},
            "left_out": list(plan.left_out),
        },
    )
    records.write_json(
        job.folder / "manifest.json",
        {
            **common,
            "switch": dict(job.switch),
            "seeds": dict.fromkeys(("python", "numpy", "torch", "fewshot"), options.seed),
            **machine,
        },
    )
    return visual_tokens


def _wanted(identity: Mapping[str, Any], asked_for: bool) -> Mapping[str, Any]:
    """Of a task that this command does not evaluate, a result with any metrics will do."""
    return identity if asked_for or "metrics" not in identity else {**identity, "metrics": "table"}


def write_page(plan: Plan) -> str:
    """Write ``report.html``, the table with figures and token maps; returns where it is, or why there is none.

    An evaluation does not fail because of its report.
    """
    page = plan.output / "report.html"
    transformers.utils.logging.disable_progress_bar()
    try:
        from llava.eval.report import write_report as write_page_of

        device = "cuda" if plan.device == "cuda" else "cpu"
        write_page_of([plan.output], page, allow_mixed=True, folded=True, images=IMAGES, device=device)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        page.unlink(missing_ok=True)
        return f"There is no report: {error}"
    return f"Report: {page}"


def write_report(plan: Plan, arguments: Sequence[str], last: bool = True) -> Table:
    """Write the table over all finished rows in the folder, and the manifest; returns the table.

    Parameters
    ----------
    plan : Plan
    arguments : sequence of str
        The command line.
    last : bool
        All jobs are finished: compute intervals, which takes seconds.
    """
    before = records.read_json(plan.output / "manifest.json")
    before = before if isinstance(before, dict) else {}
    folders, refused = _job_folders(plan, before)
    for reason in refused if last else ():
        print(f"Left out of the table: {reason}", flush=True)
    finished = [folder / "results.json" for folder in folders if (folder / "results.json").exists()]
    contents = [records.read_json(path) for path in finished]
    records.write_json(plan.output / "results.json", {"format": FORMAT, "runs": contents})
    tasks = {*plan.tasks, *_names(before, "tasks")}
    records.write_json(
        plan.output / "manifest.json",
        {
            "command": shlex.join(["run_OTPrune.sh", *arguments]),
            "suite": plan.suite.name,
            "tasks": [task for task in plan.suite.tasks if task in tasks],
            "left_out": list(plan.left_out),
            "jobs": [str(folder.relative_to(plan.output)) for folder in folders],
            "git_commit": git_commit(),
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    )
    # Rows of earlier commands may have other settings or versions: they are shown with a warning.
    table = build_table(load_runs([plan.output]), intervals=last, allow_mixed=True)
    for name, file in TABLES.items():
        atomic_write(plan.output / file, table.render(name))
    return table


def _job_folders(plan: Plan, before: Mapping[str, Any]) -> tuple[list[Path], list[str]]:
    """The folders of all rows in the output folder, and why some are left out.

    In the order of the previous command's manifest, then this command's rows, then others.
    """
    own = [job.folder for job in plan.jobs]
    named = [plan.output / job for job in _names(before, "jobs")]
    found = sorted(path.parent for path in plan.output.glob("*/*/results.json"))
    folders, refused = [], []
    for folder in dict.fromkeys([*named, *own, *found]):
        # A job of this command that has not begun may have results of an earlier one.
        if folder not in own or (folder / "results.json").exists():
            try:
                load_runs([folder])
            except ValueError as error:
                refused.append(str(error))
                continue
        folders.append(folder)
    return folders, refused


def _names(manifest: Mapping[str, Any], key: str) -> list[str]:
    found = manifest.get(key)
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
