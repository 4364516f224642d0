"""Runs one job: starts its worker group, and starts it again without the task that brought it down."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from llava.pruning.ocvtp.variables import translated

from . import records
from .options import OFF, Options
from .plan import SWITCH, Job, Plan
from .tasks import data_version

JOIN = timedelta(minutes=10)
"""For the machines of a run to find each other."""
WORKER = "lmms_eval_otprune_runner.worker"


@dataclass(frozen=True)
class Launch:
    """How the processes of a worker group are started.

    Attributes
    ----------
    command : tuple of str
        The worker's specification is appended.
    environment : dict
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]


def describe_launch(job: Job, plan: Plan, options: Options) -> Launch:
    """One plain process, or torchrun's: as many as asked for, on this machine and on the others."""
    rest = {name: value for name, value in translated(os.environ).items() if name not in SWITCH}
    environment = {**rest, **job.switch}
    if plan.device == "cpu":
        # Otherwise accelerate looks for as many GPUs, and starts one process when there are none.
        environment["ACCELERATE_USE_CPU"] = "true"
    if plan.num_processes > 1:
        # More threads than cores make each other wait.
        environment.setdefault("OMP_NUM_THREADS", "1")
    if plan.num_processes == 1 and options.num_machines == 1:
        return Launch((sys.executable, "-m", WORKER), environment)
    meeting = ["--standalone"]
    if options.num_machines > 1:
        meeting = [
            f"--nnodes={options.num_machines}",
            f"--node_rank={options.machine_rank}",
            f"--master_addr={options.main_process_ip}",
            f"--master_port={options.main_process_port}",
            f"--rdzv_conf=timeout={JOIN.seconds}",
        ]
    torchrun = (sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc_per_node={plan.num_processes}")
    return Launch((*torchrun, "-m", WORKER), environment)


def run_job(job: Job, plan: Plan, options: Options, identities: Mapping[str, Mapping[str, Any]]) -> None:
    """Evaluate the tasks of a job that have no result yet; what happened is found in the job's folder.

    A task that fails, or takes its worker with it, costs itself alone: the others are evaluated by a new worker group.
    """
    todo = [task for task in plan.tasks if not records.finished(job.folder, task, identities[task])]
    for task in todo:
        records.forget_failure(job.folder, task)
    state = job.folder / f"worker-{options.machine_rank}.json"
    launch = describe_launch(job, plan, options)
    specification = {
        "model": job.model,
        "label": job.label,
        "folder": str(job.folder),
        "answers": str(job.folder / f"answers-{data_version(plan.suite)}"),
        "state": str(state),
        "device": None if plan.device == "cuda" else plan.device,
        "dtype": plan.dtype,
        "conv_template": options.conv_template,
        "batch_size": plan.batch_size,
        "visual_cache": _visual_cache(plan),
        "limit": options.limit,
        "grey": job.grey,
        "all_metrics": options.all_metrics,
        "seed": options.seed,
        "identities": identities,
    }
    # The other machines' result folders may be their own: they follow machine 0 even when it has nothing left to do.
    while todo or options.num_machines > 1:
        path = job.folder / f"worker-{options.machine_rank}.specification.json"
        records.write_json(path, {**specification, "tasks": todo})
        state.unlink(missing_ok=True)
        status = _start(launch, path)
        if status == 0:
            return
        progress = records.read_json(state) or {}
        if "task" not in progress:
            reason = progress.get("cannot_start", f"the worker ended with status {status} before its first task")
            if not progress and options.num_machines > 1:
                reason += (
                    f"; {options.num_machines} machines were to meet at {options.main_process_ip}:"
                    f"{options.main_process_port} within {JOIN.seconds // 60} minutes"
                )
            for task in todo:
                records.record_failure(job.folder, task, reason)
            return
        todo = [task for task in todo if not records.finished(job.folder, task, identities[task])]
        if progress["task"] in todo and records.failure(job.folder, progress["task"]) is None:
            records.record_failure(job.folder, progress["task"], f"the worker ended with status {status}")
        todo = [task for task in todo if records.failure(job.folder, task) is None]


def _visual_cache(plan: Plan) -> dict[str, Any]:
    """Arguments of the model."""
    if plan.visual_cache is None:
        return {"visual_cache": OFF}
    if plan.visual_cache == 0:
        return {}
    return {"visual_cache": plan.visual_cache, "visual_cache_folder": str(plan.encoded_images)}


def _start(launch: Launch, specification: Path) -> int:
    """Run a worker group to its end. The pipe tells the workers when this process is gone, however it went."""
    process = subprocess.Popen(
        [*launch.command, str(specification)], env=dict(launch.environment), stdin=subprocess.PIPE
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.stdin.close()
        process.wait()
        raise
