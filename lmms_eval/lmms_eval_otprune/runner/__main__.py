"""``python -m lmms_eval_otprune.runner``: the table, from one command."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Options, read

if TYPE_CHECKING:
    from .plan import Job, Plan


def main(arguments: Sequence[str]) -> int:
    """Run what the command line says; 0 when every task has its result."""
    options = read(arguments)
    # The imports take seconds: --help and a wrong value should not.
    from llava.runtime import forget_place, print_everything

    from .lock import locked
    from .plan import make_plan
    from .records import sentence

    print_everything()
    forget_place()
    try:
        plan = make_plan(options)
    except ValueError as error:
        print(f"run_OTPrune.sh: {error}", file=sys.stderr)
        return 2
    _announce(plan, options)
    if options.dry_run:
        return 0
    try:
        with locked(plan.output, options.machine_rank):
            return _run(plan, options, arguments)
    except OSError as error:
        print(f"run_OTPrune.sh: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues here.", file=sys.stderr)
        return 130


def _run(plan: Plan, options: Options, arguments: Sequence[str]) -> int:
    from lmms_eval_otprune.models.token_counts import describe

    from . import records
    from .dispatch import evaluate
    from .estimate import estimate, in_words
    from .report import collect, write_page, write_report
    from .screen import Screen
    from .tasks import task_identities

    identities = {job.folder: task_identities(job, plan, options) for job in plan.jobs}
    units = [
        (job, task)
        for job in plan.jobs
        for task in plan.tasks
        if not records.finished(job.folder, task, identities[job.folder][task])
    ]
    seconds = estimate(units, plan, options.limit, options.report)
    done = len(plan.jobs) * len(plan.tasks) - len(units)
    print(
        f"{len(plan.jobs)} rows x {len(plan.tasks)} tasks{f', {done} of them done' if done else ''}"
        f"{f', {in_words(seconds)} here' if seconds else ''}",
        flush=True,
    )
    with Screen(len(plan.jobs) * len(plan.tasks)) as screen:

        def finished(job: Job) -> None:
            if options.machine_rank > 0:
                return
            visual_tokens = collect(job, plan, options, identities[job.folder])
            if visual_tokens:
                screen.say(f"{job.label}: {describe(visual_tokens)}")
            screen.show(write_report(plan, arguments, last=False).rows)

        for model in dict.fromkeys(job.model for job in plan.jobs):
            jobs = [job for job in plan.jobs if job.model == model]
            evaluate(jobs, plan, options, identities, screen, finished)
    if options.machine_rank > 0:
        print("The results are on the machine of rank 0.")
    else:
        table = write_report(plan, arguments)
        screen.finish(table)
        print(f"\nEverything is in {plan.output}", flush=True)
        if options.report:
            print(write_page(plan))
    status = _failures(plan, identities if options.machine_rank == 0 else None)
    if status == 0:
        _forget_encoded_images(plan.encoded_images)
    return status


def _forget_encoded_images(folder: Path) -> None:
    """Remove the store of encoded images, which no later row needs."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # those of another machine are still there
        folder.parent.rmdir()


def _failures(plan: Plan, identities_of: Mapping[Path, Mapping[str, Any]] | None = None) -> int:
    """Print what failed and return the exit status; with ``identities_of``, tasks without a result failed, too."""
    from . import records

    failed: dict[tuple[str, str], list[str]] = {}
    for job in plan.jobs:
        for task in plan.tasks:
            reason = records.failure(job.folder, task)
            if identities_of and not records.finished(job.folder, task, identities_of[job.folder][task]):
                reason = reason or "it has no result"
            if reason:
                failed.setdefault((job.label, reason), []).append(task)
    for (label, reason), tasks in failed.items():
        print(f"FAILED {label}, {', '.join(tasks)}: {reason}", file=sys.stderr)
    if failed:
        print("What was printed meanwhile: worker.log in the folder of each run.", file=sys.stderr)
    return 1 if failed else 0


def _announce(plan: Plan, options: Options) -> None:
    from lmms_eval_otprune.models.java import PACKAGE

    if plan.left_out:
        print(
            f"Java is missing, so {len(plan.left_out)} caption tasks ({', '.join(plan.left_out)}) are left out; "
            f"they need the package {PACKAGE} (Debian, Ubuntu)."
        )
    pruned = f" ({plan.pruned_batch_size} pruned before the decoder)" * (plan.pruned_batch_size != plan.batch_size)
    print(
        f"{plan.suite.name} suite, {len(plan.jobs)} rows of {len(plan.tasks)} tasks"
        f"{f', {options.limit} documents each' if options.limit else ''}, on {plan.num_processes} x {plan.device}, "
        f"{plan.dtype}, batch {plan.batch_size}{pruned}; results go to {plan.output}"
    )
    if not options.dry_run:
        return
    from .dispatch import describe_workers

    for job in plan.jobs:
        switch = " ".join(f"{name}={shlex.quote(value)}" for name, value in job.switch.items())
        what = "unpruned, grey images" if job.grey else "unpruned"
        print(f"  {job.model}: {job.pruning.describe() if job.pruning else what}")
        if switch:
            print(f"    {switch}")
    number, launch = describe_workers(plan, options, len(plan.jobs) * len(plan.tasks))
    print(f"  {number} x {shlex.join(launch.command)} ...")
    print(f"  tasks: {', '.join(plan.tasks)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
