"""Starts workers, which evaluate the tasks that they are handed, and listens to them."""

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
from typing import Any

from llava.pruning.methods.ocvtp.variables import translated

from .options import Options
from .plan import SWITCH, Plan

JOIN_MINUTES = 10
"""For the machines of a run to find each other."""
WORKER = "lmms_eval_otprune.runner.worker"


@dataclass(frozen=True)
class Launch:
    """How a worker is started: one process, or a group that evaluates each task together.

    Attributes
    ----------
    command : tuple of str
        The worker's specification is appended.
    environment : dict
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]


def describe_launch(plan: Plan, options: Options, processes: int) -> Launch:
    """One plain process, or torchrun's: as many as asked for, on this machine and on the others."""
    environment = {name: value for name, value in translated(os.environ).items() if name not in SWITCH}
    if plan.device == "cpu":
        # Otherwise accelerate looks for as many GPUs, and starts one process when there are none.
        environment["ACCELERATE_USE_CPU"] = "true"
    if plan.num_processes > 1:
        # More threads than cores make each other wait.
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
    """A running worker: a process, or a group of them, that speaks for itself through its first process.

    What it says is put on a queue as (worker, event); the last event is ``{"ended": status}``. It ends when its
    standard input does, and so with this process, however that goes.

    Parameters
    ----------
    launch : Launch
    specification : Path
    log : Path
        What it prints goes there.
    events : Queue

    Attributes
    ----------
    unit : tuple of (int, str), or None
        Number of the job and the task that it is at.
    has_worked : bool
        Whether it has come as far as its first task.
    """

    def __init__(self, launch: Launch, specification: Path, log: Path, events: Queue):
        self.unit: tuple[int, str] | None = None
        self.has_worked = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*launch.command, str(specification)],
                env=dict(launch.environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def give(self, unit: tuple[int, str] | None) -> None:
        """Hand over the next task; None: there is none."""
        self.unit = unit
        with suppress(BrokenPipeError):  # it has just died, and its end is on the queue
            self._process.stdin.write(json.dumps(unit).encode() + b"\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """End it, and wait until it is gone."""
        self._process.stdin.close()
        self._process.wait()

    def _listen(self, events: Queue[tuple[Worker, dict[str, Any]]]) -> None:
        for line in self._process.stdout:
            # Libraries may print before the worker has sent that to its log.
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    events.put((self, event))
        events.put((self, {"ended": self._process.wait()}))
