"""The files that people read: results.json and manifest.json of each job, and the table over all of them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from lmms_eval_otprune.token_counts import merged_summary

from llava.eval.table import build_table, load_runs
from llava.files import atomic_write

from . import records
from .manifest import git_commit
from .options import Options
from .plan import Job, Plan

PICTURES = 8
"""Of each benchmark, for the distances in the report."""
TABLES = {"markdown": "table.md", "csv": "table.csv", "json": "table.json", "html": "table.html", "latex": "table.tex"}


def collect(
    job: Job, plan: Plan, options: Options, identities: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Put a job's task results together: ``results.json`` and ``manifest.json`` in its folder.

    Returns
    -------
    dict, or None without images
        The `summary` of visual tokens over all tasks.
    """
    results = {task: records.finished(job.folder, task, identities[task]) for task in plan.tasks}
    done = {task: result for task, result in results.items() if result}
    machine = records.read_json(job.folder / "machine.json") or {}
    pruning = machine.pop("pruning", None) or (job.pruning and job.pruning.to_dict())
    if pruning is not None:
        pruning["set_options"] = sorted(job.pruning.options)
    visual_tokens = merged_summary([result["visual_tokens"] for result in done.values() if result["visual_tokens"]])
    common = {
        "suite": plan.suite.name,
        "model": job.model,
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
            "failed": {task: reason for task in plan.tasks if (reason := records.failure(job.folder, task))},
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


def write_page(plan: Plan) -> str:
    """Write ``report.html``, the table with figures and token maps; returns where it is, or why it is not there.

    Hours of evaluation do not fail for a drawing: whatever stops it becomes a sentence.
    """
    page = plan.output / "report.html"
    try:
        from llava.eval.report import write_report as write_page_of

        device = "cuda" if plan.device == "cuda" else "cpu"
        write_page_of([plan.output], page, allow_mixed=True, folded=True, pictures=PICTURES, device=device)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        page.unlink(missing_ok=True)
        return f"There is no report: {error}"
    return f"Report: {page}"


def write_report(plan: Plan, arguments: Sequence[str], last: bool = True) -> str:
    """Write the table in every format and the manifest of the whole run; returns the table in Markdown.

    Parameters
    ----------
    plan : Plan
    arguments : sequence of str
        The command line.
    last : bool
        All jobs are done: intervals are worth their seconds now.
    """
    runs = [records.read_json(job.folder / "results.json") for job in plan.jobs]
    records.write_json(plan.output / "results.json", {"runs": [run for run in runs if run]})
    records.write_json(
        plan.output / "manifest.json",
        {
            "command": shlex.join(["run_OTPrune.sh", *arguments]),
            "suite": plan.suite.name,
            "tasks": list(plan.tasks),
            "left_out": list(plan.left_out),
            "jobs": [str(job.folder.relative_to(plan.output)) for job in plan.jobs],
            "git_commit": git_commit(),
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    )
    # The jobs of one run are alike but for a task that an older version finished, which is better shown than hidden.
    rows = load_runs([plan.output])
    try:
        table = build_table(rows, intervals=last, allow_mixed=True)
    except ValueError as error:
        table = build_table(rows, allow_mixed=True, remarks=[f"No intervals: {error}."])
    for name, file in TABLES.items():
        atomic_write(plan.output / file, table.render(name))
    return table.render("markdown")
