"""The training loop that everything trained here shares: seeded, resumable bit for bit, safe against being killed.

Whatever is random about a step comes from the run's seed and the step's number, so the whole state of a run is the
trained weights, the optimisers, the step and the sums of the current log line. `accelerate launch` starts it in several
processes, each of which works on its share of every step.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from llava.files import atomic_write

LOG = "log.jsonl"


@dataclass(frozen=True)
class Run:
    """Where and how something is trained.

    Attributes
    ----------
    folder, name
        The folder gets ``<name>.pt``, the state, and lines of ``log.jsonl``.
    seed : int
    resume : bool
        Continue from the state if there is one.
    seconds, last_step
        After this long, or after this step, the state is saved and the loop left.
    save_seconds, save_steps
        How often the state is saved.
    log_steps : int
        Steps that a log line is the mean of.
    precision : str
        "no" or "bf16": of matrix products; the weights keep their dtype.
    cpu : bool
        Stay on the CPU where there is a GPU.

    Raises
    ------
    ValueError
        If there is a state that is not to be resumed.
    """

    folder: Path
    name: str = "state"
    seed: int = 0
    resume: bool = False
    seconds: float = math.inf
    last_step: int | None = None
    save_seconds: float = 180.0
    save_steps: int | None = None
    log_steps: int = 50
    precision: str = "no"
    cpu: bool = False

    def __post_init__(self):
        if self.state_file.exists() and not self.resume:
            raise ValueError(f"{self.folder} holds a run: give --resume, or another --output")

    @property
    def state_file(self) -> Path:
        """The file that holds the state."""
        return self.folder / f"{self.name}.pt"


class NonFiniteLoss(FloatingPointError):
    """A loss is infinite or not a number; the state on the disk is from before.

    ``part`` is which of the step's forward passes in this process it was, from 0; None where it was in another process.
    """

    def __init__(self, step: int, part: int | None, loss: float):
        super().__init__(f"the loss of step {step} is {loss}")
        self.step, self.part = step, part


class Trainer:
    """A module, its optimisers and how far they are.

    Parameters
    ----------
    task : nn.Module
        Parameters without gradients are neither trained nor saved.
    optimizers : sequence of Optimizer
        With the learning rates that `fit` scales.
    run : Run
    clip : float
        Largest norm of a step's gradient.
    accumulate : int
        Forward passes a step.
    losses : callable
        What the task returns -> name -> scalar Tensor: summed for the gradient, but for names with a ``/``, which are
        only logged.
    settings : mapping, optional
        What has to be the same when the run is resumed.

    Attributes
    ----------
    task : nn.Module
        As accelerate prepared it.
    accelerator : Accelerator
    step : int
        Steps done.

    Raises
    ------
    OSError, ValueError
        If the state cannot be read, or is one of other settings.
    """

    def __init__(
        self,
        task: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        run: Run,
        *,
        clip: float = 1.0,
        accumulate: int = 1,
        losses: Callable[[Any], Mapping[str, torch.Tensor]] = dict,
        settings: Mapping[str, Any] | None = None,
    ):
        self.run, self.clip, self.accumulate, self.losses = run, clip, accumulate, losses
        self.settings = dict(settings or {})
        self.step, self.seconds = 0, 0.0
        self._sums: dict[str, tuple[float, int]] = {}
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self._trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
        if (state := self._read_state()) is not None:
            unknown = task.load_state_dict(state["model"], strict=False).unexpected_keys
            if unknown:
                raise ValueError(f"{run.state_file} is of another model: it holds {unknown[0]}, this one does not")
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds, self._sums = state["step"], state["seconds"], state["sums"]
        # A batch of text alone gives a projector no gradient, in some processes or in all.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(
            mixed_precision=run.precision,
            gradient_accumulation_steps=accumulate,
            cpu=run.cpu,
            kwargs_handlers=[unused],
        )
        self.task, *self.optimizers = self.accelerator.prepare(task, *optimizers)
        run.folder.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            self._cut_log()

    def share(self, size: int) -> int:
        """Examples of one forward pass of this process, where a step has ``size`` over all passes and processes.

        A ValueError if they do not divide.
        """
        share, rest = divmod(size, self.accelerator.num_processes * self.accumulate)
        if rest:
            passes = f" of {self.accumulate} passes each" if self.accumulate > 1 else ""
            raise ValueError(
                f"a step of {size} examples does not divide by {self.accelerator.num_processes} processes{passes}"
            )
        return share

    def batches(
        self,
        data: Dataset,
        order: Sequence[int],
        size: int,
        steps: int,
        collate: Callable[[list], Any] = default_collate,
        workers: int = 0,
    ) -> DataLoader:
        """This process's batches of examples by number, from the next step on.

        Parameters
        ----------
        data, collate
        order : sequence of int
            Examples in the order in which steps take them; its beginning follows its end.
        size, steps : int
            Examples a step, over all processes and passes; and steps in all.
        workers : int
            Processes that prepare later batches meanwhile.
        """
        share, accelerator = self.share(size), self.accelerator
        stride = share * accelerator.num_processes
        first = [
            step * size + part * stride + accelerator.process_index * share
            for step in range(self.step, steps)
            for part in range(self.accumulate)
        ]
        numbers = [[order[place % len(order)] for place in range(start, start + share)] for start in first]
        return DataLoader(data, batch_sampler=numbers, collate_fn=collate, num_workers=workers)

    def fit(
        self,
        batches: Iterable[Any],
        steps: int,
        factor: Callable[[int], float],
        on_log: Callable[[dict[str, Any]], bool | None] | None = None,
    ) -> bool:
        """Train from the current step on; returns whether the training is complete, or its time was up.

        The state is saved in both cases. A `NonFiniteLoss` ends it.

        Parameters
        ----------
        batches : iterable
            This process's batches from the current step on, ``accumulate`` a step: arguments of the task, a mapping
            or a sequence.
        steps : int
            In all, those done before included.
        factor : callable
            Step (from 0) -> share of the learning rates.
        on_log : callable, optional
            Gets each log line before it is written, in every process, and may add to it. Training ends where it
            returns True.
        """
        run, main = self.run, self.accelerator.is_main_process
        began = time.monotonic() - self.seconds
        saved, end = time.monotonic(), time.monotonic() + run.seconds
        batches, ended = iter(batches), False
        self.task.train()
        hidden = None if main else True  # None: where there is no terminal
        with tqdm(total=steps, initial=self.step, desc=run.name, unit="step", disable=hidden, mininterval=1) as bar:
            while self.step < steps and not ended:
                late, means = self._take_step(batches, factor(self.step), time.monotonic() > end)
                self.step += 1
                self.seconds = time.monotonic() - began
                bar.update()
                bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
                if self.step % run.log_steps == 0 or self.step == steps:
                    ended = self._log_line(on_log)
                    self.task.train()
                done = ended or self.step == steps
                late = late or self.step == run.last_step
                due = time.monotonic() - saved > run.save_seconds or self.step % (run.save_steps or steps) == 0
                if main and (done or late or due):
                    self._save()
                    saved = time.monotonic()
                if late and not done:
                    if main:
                        said = f"{run.name} stopped after {self.step} of {steps} steps; --resume continues"
                        print(said, file=sys.stderr)
                    return False
        self.accelerator.wait_for_everyone()
        return True

    def _take_step(self, batches, factor: float, late: bool) -> tuple[bool, dict[str, float]]:
        """One optimiser step: whether any process is late, the mean loss of all, and this process's other reports."""
        accelerator = self.accelerator
        for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        reports = []
        for part in range(self.accumulate):
            batch = send_to_device(next(batches), accelerator.device)
            torch.manual_seed(seed_of(self.run.seed, self.run.name, self.step, part, accelerator.process_index))
            with accelerator.accumulate(self.task):
                losses = self.losses(self.task(**batch) if isinstance(batch, Mapping) else self.task(*batch))
                loss: Any = sum(value for name, value in losses.items() if "/" not in name)
                accelerator.backward(loss)
                report = {"loss": loss.detach()}
                report |= {name: value.detach() for name, value in losses.items() if name != "loss"}
                if accelerator.sync_gradients:
                    report["gradient"] = accelerator.clip_grad_norm_(list(self._trained.values()), self.clip)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            reports.append(report)
        names = list(dict.fromkeys(name for report in reports for name in report))
        own = [torch.stack([report[name].float() for report in reports if name in report]).mean() for name in names]
        shared = torch.stack([own[0], torch.tensor(float(late), device=accelerator.device)])
        # One wait for the device per step. What the task reports may differ from process to process; its loss does not.
        mean, late, *values = torch.cat([accelerator.reduce(shared, "mean"), torch.stack(own)]).tolist()
        means = {**dict(zip(names, values, strict=True)), "loss": mean}
        if not math.isfinite(means["loss"]):
            failed = (number for number, report in enumerate(reports) if not report["loss"].isfinite())
            raise NonFiniteLoss(self.step, next(failed, None), means["loss"])
        for name, value in means.items():
            if math.isfinite(value):  # an accuracy over nothing is not a number
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)
        return late > 0, means

    def _log_line(self, on_log: Callable[[dict[str, Any]], bool | None] | None) -> bool:
        line = {
            "run": self.run.name,
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "learning_rate": self.optimizers[-1].param_groups[0]["lr"],
            **{name: total / count for name, (total, count) in self._sums.items()},
        }
        self._sums = {}
        ended = bool(on_log and on_log(line))
        if self.accelerator.is_main_process:
            with (self.run.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return ended

    def _cut_log(self) -> None:
        """Drop lines that are ahead of the state: the run was killed after it wrote them."""
        file = self.run.folder / LOG
        if file.exists():
            lines = [
                line for line in read_log(self.run.folder) if line["run"] != self.run.name or line["step"] <= self.step
            ]
            atomic_write(file, "".join(json.dumps(line) + "\n" for line in lines))

    def _read_state(self) -> dict[str, Any] | None:
        file = self.run.state_file
        if not file.exists():
            return None
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            made_with = state["settings"]
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise OSError(f"Cannot read the run in {file}: {reason}") from error
        for name, value in self.settings.items():
            if made_with.get(name) != value:
                raise ValueError(
                    f"{self.run.folder} was trained with {name} {made_with.get(name)}, not {value}: resuming it "
                    "requires the same data and options"
                )
        return state

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "sums": self._sums,
            "settings": self.settings,
            "model": {name: p.detach() for name, p in self._trained.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        atomic_write(self.run.state_file, lambda part: torch.save(state, part))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's log; one that a killed process left unfinished is left out."""
    lines = []
    for text in (folder / LOG).read_text(encoding="utf-8").splitlines() if (folder / LOG).is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def seed_of(*key: object) -> int:
    """A seed that depends on nothing but the key."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:7], "little")
