"""Distributes a model's tasks among workers, and replaces a worker that a task has brought down."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

from . import records
from .launch import JOIN_MINUTES, Launch, Worker, describe_launch
from .options import OFF, Options
from .plan import Job, Plan
from .screen import Screen
from .tasks import data_versions

UNITS_PER_PROCESS = 4
"""From this many tasks per process on, CPU processes work on different tasks, so that none waits for the others."""

Identities = Mapping[Path, Mapping[str, Mapping[str, Any]]]
"""Job's folder -> task -> what its result depends on."""


def evaluate(
    jobs: Sequence[Job],
    plan: Plan,
    options: Options,
    identities: Identities,
    screen: Screen,
    finished: Callable[[Job], None],
) -> None:
    """Evaluate all tasks without a result; results and failures are written to the jobs' folders.

    A task that fails, or brings its worker down, does not affect the others.

    Parameters
    ----------
    jobs : sequence of Job
        Of one model, which each worker loads once.
    plan, options
    identities
    screen : Screen
    finished : callable
        Called with each job of which all tasks have been tried.
    """
    todo = deque(
        (number, task)
        for number, job in enumerate(jobs)
        for task in plan.tasks
        if not records.finished(job.folder, task, identities[job.folder][task])
    )
    for number, task in todo:
        records.forget_failure(jobs[number].folder, task)
    left = Counter(number for number, _ in todo)
    for number, job in enumerate(jobs):
        if not left[number]:
            finished(job)
    if not todo and options.num_machines == 1:
        return

    number_of_workers, launch = describe_workers(plan, options, len(todo), jobs[0].wrapper is not None)
    events: Queue[tuple[Worker, dict[str, Any]]] = Queue()
    folder = jobs[0].folder.parent
    specification = _specification(jobs, plan, options, identities, left)

    def start(writer: int | None) -> Worker:
        number = options.machine_rank if writer is None else writer
        path = folder / f"worker-{number}.specification.json"
        records.write_json(path, {**specification, "writer": writer})
        # What is printed before the first task goes to the log of its job.
        log = jobs[todo[0][0] if todo else 0].folder / "worker.log"
        return Worker(launch, path, log, events)

    def close(number: int, task: str, error: str | None = None) -> None:
        """A task has been tried."""
        job = jobs[number]
        known = records.failure(job.folder, task) or records.finished(job.folder, task, identities[job.folder][task])
        if error is not None and not known:
            records.record_failure(job.folder, task, error)
        screen.end(job, task)
        left[number] -= 1
        if not left[number]:
            finished(job)

    writers = (None,) if number_of_workers == 1 else range(number_of_workers)
    workers = {start(writer): writer for writer in writers}
    problem = None
    try:
        while workers:
            worker, event = events.get()
            if "ready" in event:
                unit = _next(todo, worker) if todo else None
                worker.give(unit)
            elif "begins" in event:
                number, task = worker.unit = tuple(event["begins"])
                worker.has_worked = True
                screen.begin(worker, jobs[number], task)
            elif "of" in event:
                screen.advance(worker, event["done"], event["of"])
            elif "tried" in event:
                worker.unit = None
                screen.leave(worker)
                if options.machine_rank == 0:
                    close(*event["tried"])
            elif "says" in event:
                screen.say(event["says"])
            elif "cannot_start" in event:
                problem = event["cannot_start"]
            elif "ended" in event:
                writer = workers.pop(worker)
                screen.leave(worker)
                if event["ended"] == 0:
                    continue
                status = f"the worker ended with status {event['ended']}"
                if worker.unit is not None and options.machine_rank == 0:
                    close(*worker.unit, status)
                if worker.has_worked and (todo or options.num_machines > 1):
                    workers[start(writer)] = writer
                elif not worker.has_worked and not workers:
                    _give_up(jobs, todo, plan, options, problem or f"{status} before its first task{_meeting(options)}")
                    while todo:
                        close(*todo.popleft())
    except KeyboardInterrupt:
        for worker in workers:
            worker.stop()
        raise


def _next(todo: deque[tuple[int, str]], worker: Worker) -> tuple[int, str]:
    """Take a task of the first row for a worker: one that it has prepared for an earlier row, if there is any."""
    row = [unit for unit in todo if unit[0] == todo[0][0]]
    unit = next((unit for unit in row if unit[1] in worker.tasks), row[0])
    todo.remove(unit)
    worker.tasks.add(unit[1])
    return unit


def describe_workers(plan: Plan, options: Options, units: int, wrapped: bool = False) -> tuple[int, Launch]:
    """How many workers evaluate so many tasks, and how to start them; ``wrapped`` models share tasks on GPUs only."""
    enough = units >= UNITS_PER_PROCESS * plan.num_processes
    if plan.device == "cpu" and options.num_machines == 1 and (enough or wrapped):
        return min(plan.num_processes, max(units, 1)), describe_launch(plan, options, 1)
    return 1, describe_launch(plan, options, plan.num_processes)


def _meeting(options: Options) -> str:
    if options.num_machines == 1:
        return ""
    place = f"{options.main_process_ip}:{options.main_process_port}"
    return f"; {options.num_machines} machines were to meet at {place} within {JOIN_MINUTES} minutes"


def _give_up(jobs: Sequence[Job], todo: Sequence[tuple[int, str]], plan: Plan, options: Options, problem: str) -> None:
    """Record why the remaining tasks cannot be evaluated."""
    everything = [(number, task) for number in range(len(jobs)) for task in plan.tasks]
    for number, task in todo if options.machine_rank == 0 else everything:
        records.record_failure(jobs[number].folder, task, problem)


def _specification(
    jobs: Sequence[Job], plan: Plan, options: Options, identities: Identities, left: Mapping[int, int]
) -> dict[str, Any]:
    return {
        "model": jobs[0].model,
        "model_base": options.model_base,
        "wrapper": jobs[0].wrapper,
        "device": None if plan.device == "cuda" else plan.device,
        "dtype": plan.dtype,
        "batch_size": options.batch_size or 1 if jobs[0].wrapper else plan.batch_size,
        "pruned_batch_size": plan.pruned_batch_size,
        "conv_template": options.conv_template,
        "visual_cache": _visual_cache(plan),
        "processes": plan.num_processes * options.num_machines,
        "limit": options.limit,
        "all_metrics": options.all_metrics,
        "seed": options.seed,
        "tasks": plan.tasks,
        "jobs": [
            {
                "label": job.label,
                "folder": str(job.folder),
                "answers": str(job.folder / f"answers-{data_versions(plan.suite.tasks)}"),
                "switch": job.switch,
                "grey": job.grey,
                "identities": identities[job.folder],
                "to_do": bool(left[number]),
            }
            for number, job in enumerate(jobs)
        ],
    }


def _visual_cache(plan: Plan) -> dict[str, Any]:
    """Arguments of the model."""
    if plan.visual_cache is None:
        return {"visual_cache": OFF}
    if plan.visual_cache == 0:
        return {}
    return {"visual_cache": plan.visual_cache, "visual_cache_folder": str(plan.encoded_images)}
