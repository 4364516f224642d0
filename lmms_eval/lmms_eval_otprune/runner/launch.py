"""Starts workers and receives their events."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import IO, Any

from llava.pruning.methods.ocvtp.variables import translated

from .options import Options
from .plan import SWITCH, Plan

JOIN_MINUTES = 10
"""The time that the machines of a run have to connect."""
KEEPING_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""By default glibc returns the memory of large tensors and has it zeroed again, which takes a seventh of a prefill."""
WORKER = "lmms_eval_otprune.runner.worker"


@dataclass(frozen=True)
class Launch:
    """How a worker is started: as one process, or as a group that shares each task.

    Attributes
    ----------
    command : tuple of str
        The worker's specification is appended.
    environment : dict
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]


def describe_launch(plan: Plan, options: Options, processes: int) -> Launch:
    """A single process, or a torchrun group with so many processes on each machine."""
    environment = {name: value for name, value in translated(os.environ).items() if name not in SWITCH}
    if plan.device == "cpu":
        # Otherwise accelerate looks for as many GPUs, and starts one process when there are none.
        environment["ACCELERATE_USE_CPU"] = "true"
        environment = {**KEEPING_MEMORY, **environment}
    if plan.num_processes > 1:
        # More threads than cores slow each other down.
        environment.setdefault("OMP_NUM_THREADS", "1")
    if processes == 1 and options.num_machines == 1:
        return Launch((sys.executable, "-m", WORKER), environment)
    meeting = ["--standalone"]
    if options.num_machines > 1:
        meeting = [
            f"--nnodes={options.num_machines}",
            f"--node_rank={options.machine_rank}",
            f"--master_addr={options.main_process_ip}",
            f"--master_port={options.main_process_port}",
            f"--rdzv_conf=timeout={60 * JOIN_MINUTES}",
        ]
    torchrun = (sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc_per_node={processes}")
    return Launch((*torchrun, "-m", WORKER), environment)


class Worker:
    """A running worker: one process, or a group of them.

    Its events are put on a queue as (worker, event); the last one is ``{"ended": status}``. It exits when its standard
    input is closed, and thus whenever this process ends.

    Parameters
    ----------
    launch : Launch
    specification : Path
    log : Path
        Receives what it prints.
    events : Queue

    Attributes
    ----------
    unit : tuple of (int, str), or None
        Number of the job, and the task that it is working on.
    has_worked : bool
        Whether it has begun a task.
    tasks : set of str
        Those that it was given, of any row.
    """

    def __init__(self, launch: Launch, specification: Path, log: Path, events: Queue):
        self.unit: tuple[int, str] | None = None
        self.has_worked = False
        self.tasks: set[str] = set()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*launch.command, str(specification)],
                env=dict(launch.environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        assert self._process.stdin is not None and self._process.stdout is not None  # they are pipes
        self._orders = self._process.stdin
        threading.Thread(target=self._listen, args=(self._process.stdout, events), daemon=True).start()

    def give(self, unit: tuple[int, str] | None) -> None:
        """Send the next task, or None if there are no more."""
        self.unit = unit
        with suppress(BrokenPipeError):  # it has just died: the event is on the queue
            self._orders.write(json.dumps(unit).encode() + b"\n")
            self._orders.flush()

    def stop(self) -> None:
        """Let it exit, and wait for that."""
        self._orders.close()
        self._process.wait()

    def _listen(self, printed: IO[bytes], events: Queue[tuple[Worker, dict[str, Any]]]) -> None:
        for line in printed:
            # Libraries may print before the worker has redirected standard output.
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    events.put((self, event))
        events.put((self, {"ended": self._process.wait()}))
