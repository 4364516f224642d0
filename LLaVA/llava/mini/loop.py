"""The training loop that all stages share: seeded, resumable bit for bit, safe against being killed.

Every picture of a run has a number, and a step's batch is a range of numbers, so the whole state of a run is the
weights, the optimisers and the step. Several processes on one machine (two on two cores are faster than one with two
threads) work on a share of each batch and average their gradients; every one of them then takes the same step.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from llava.files import atomic_write

__all__ = ["Run", "Stage", "learning_rate_factor", "train_stage"]


@dataclass(frozen=True)
class Stage:
    """What one stage of the recipe does, from the configuration file.

    Attributes
    ----------
    name : str
    steps : int
        Optimiser steps in all.
    batch : int
        Pictures a step, over all processes.
    learning_rate : float
        Of everything that AdamW trains: embeddings, norms, biases, heads.
    matrix_learning_rate : float
        Of the layers' weight matrices, which Muon trains (in AdamW's scale).
    warmup, decay : float
        Fractions of the steps: a linear rise at the beginning, a linear fall to zero at the end.
    weight_decay : float
    clip : float
        Largest norm of a step's gradient.

    Raises
    ------
    ValueError
        For a number out of range.
    """

    name: str
    steps: int
    batch: int
    learning_rate: float
    matrix_learning_rate: float
    warmup: float = 0.02
    decay: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self):
        for name in ("steps", "batch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number >= 1, not {getattr(self, name)!r}")
        for name in ("learning_rate", "matrix_learning_rate", "warmup", "decay", "weight_decay", "clip"):
            value, most = getattr(self, name), 1 if name in ("warmup", "decay") else math.inf
            if not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ValueError(f"{name} must be a number {'from 0 to 1' if most == 1 else '>= 0'}, not {value!r}")


@dataclass
class Run:
    """Where and how a stage is run.

    Attributes
    ----------
    folder : Path
        Holds ``<stage>.pt`` (the state) and ``log.jsonl``.
    deadline : float
        ``time.monotonic()`` after which the state is saved and the loop left; infinity for none.
    rank, world : int
        This process's number and how many there are.
    device : str
    save_seconds : float
        How often the state is saved.
    log_steps : int
    bf16 : bool
        Matrix products in bfloat16 (the weights stay float32).
    quiet : bool
        No progress bar.
    workers : int
        Processes that make the examples of later steps meanwhile; 0 makes them in this one.
    parent : int
        The process that started this one; when it is gone, one of several processes leaves.
    """

    folder: Path
    deadline: float = math.inf
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    save_seconds: float = 180.0
    log_steps: int = 50
    bf16: bool = True
    quiet: bool = False
    workers: int = 0
    parent: int = field(default_factory=os.getppid)

    def state_file(self, stage: str) -> Path:
        """The file that holds a stage's state."""
        return self.folder / f"{stage}.pt"


def learning_rate_factor(step: int, stage: Stage) -> float:
    """Warm-up, plateau, linear decay to zero: the share of the learning rate that step `step` (from 0) takes.

    A plateau instead of a cosine: a run can be made longer or shorter until its decay begins.
    """
    rise = min(1.0, (step + 1) / max(1.0, stage.warmup * stage.steps))
    fall = min(1.0, (stage.steps - step) / max(1.0, stage.decay * stage.steps))
    return rise * fall


def make_optimizers(task: nn.Module, matrices: Iterable[nn.Parameter], stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for `matrices`, AdamW for every other trainable parameter of `task`."""
    chosen = list(matrices)
    known = {id(p) for p in chosen}
    rest = [p for p in task.parameters() if p.requires_grad and id(p) not in known]
    optimizers: list[torch.optim.Optimizer] = []
    if chosen:
        optimizers.append(
            torch.optim.Muon(
                chosen,
                lr=stage.matrix_learning_rate,
                momentum=0.95,
                nesterov=True,
                weight_decay=stage.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    optimizers.append(
        torch.optim.AdamW(rest, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=stage.weight_decay)
    )
    return optimizers


def train_stage(
    stage: Stage,
    task: nn.Module,
    matrices: Iterable[nn.Parameter],
    data: Dataset,
    run: Run,
    collate: Callable[[list], object] = default_collate,
) -> bool:
    """Train `task` on `data` from its last saved state, or from step 0.

    Parameters
    ----------
    stage : Stage
    task : nn.Module
        ``task(*batch)`` returns a dict of losses, summed for the gradient; names with a ``/`` are only reported.
        Parameters without gradients are neither trained nor saved.
    matrices : iterable of Parameter
        Those that Muon trains.
    data : Dataset
        Indexable by every number below ``steps * batch``.
    run : Run
    collate : callable
        Makes a batch (a tuple) of a list of examples.

    Returns
    -------
    bool
        True when the stage is complete, False when the deadline came first; the state is saved in both cases.

    Raises
    ------
    ValueError
        If the batch does not divide by the number of processes.
    FloatingPointError
        If a loss is not finite; the last saved state is from before.
    """
    if stage.batch % run.world:
        raise ValueError(f"batch {stage.batch} does not divide by {run.world} processes")
    optimizers = make_optimizers(task, matrices, stage)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    first, seconds = _resume(stage, task, optimizers, run)
    trained = [p for p in task.parameters() if p.requires_grad]
    share = stage.batch // run.world
    log = _Log(run, stage, seconds, first)
    saved = time.monotonic()
    task.train()
    bar = tqdm(total=stage.steps, initial=first, desc=stage.name, disable=run.quiet or run.rank > 0, mininterval=5)
    starts = [step * stage.batch + run.rank * share for step in range(first, stage.steps)]
    batches = DataLoader(
        data,
        batch_sampler=[range(start, start + share) for start in starts],
        collate_fn=collate,
        num_workers=run.workers,
        generator=torch.Generator(),  # or it would draw from the one whose state is saved
    )
    for step, batch in enumerate(batches, start=first):
        if run.world > 1 and os.getppid() != run.parent:
            raise SystemExit("the process that started this one is gone")
        factor = learning_rate_factor(step, stage)
        for optimizer, bases in zip(optimizers, rates, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
        batch = _moved(batch, run.device)
        with torch.autocast(torch.device(run.device).type, torch.bfloat16, enabled=run.bf16):
            report = task(*batch)
        loss = sum(value for name, value in report.items() if "/" not in name)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"stage {stage.name}: the loss of step {step} is {loss.item()}")
        loss.backward()
        late = _average(trained, time.monotonic() > run.deadline, run)
        norm = nn.utils.clip_grad_norm_(trained, stage.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        log.add({"loss": loss, "gradient": norm, **report})
        bar.update()
        done = step + 1
        if done % run.log_steps == 0 or done == stage.steps:
            log.write(done, factor)
        if late or done == stage.steps or (time.monotonic() - saved > run.save_seconds and run.rank == 0):
            _save(stage, task, optimizers, done, log.seconds(), run)
            saved = time.monotonic()
        if late:
            bar.close()
            return done == stage.steps
    bar.close()
    return True


def _moved(batch, device: str):
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(value, device) for value in batch)
    if is_dataclass(batch):
        return replace(batch, **{part.name: _moved(getattr(batch, part.name), device) for part in fields(batch)})
    return batch


def _average(parameters: list[nn.Parameter], late: bool, run: Run) -> bool:
    """Average the gradients over the processes; returns whether any of them is past its deadline."""
    if run.world == 1:
        return late
    # A batch without pictures leaves the projector without gradients, in every process.
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads] + [torch.tensor([float(late)], device=run.device)])
    distributed.all_reduce(flat)
    for grad, part in zip(grads, flat[:-1].div_(run.world).split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))
    return flat[-1].item() > 0


def _save(stage: Stage, task: nn.Module, optimizers: list, step: int, seconds: float, run: Run) -> None:
    if run.rank:
        return
    names = {name for name, p in task.named_parameters() if p.requires_grad}
    state = {
        "step": step,
        "seconds": seconds,
        "model": {name: value for name, value in task.state_dict().items() if name in names},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rng": torch.get_rng_state(),
    }
    atomic_write(run.state_file(stage.name), lambda part: torch.save(state, part))


def _resume(stage: Stage, task: nn.Module, optimizers: list, run: Run) -> tuple[int, float]:
    file = run.state_file(stage.name)
    if not file.exists():
        return 0, 0.0
    state = torch.load(file, map_location=run.device, weights_only=True)
    task.load_state_dict(state["model"], strict=False)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["rng"].cpu())
    return state["step"], state["seconds"]


class _Log:
    """Means of what the steps reported, as lines of ``log.jsonl``."""

    def __init__(self, run: Run, stage: Stage, seconds: float, step: int):
        self.run, self.stage, self.before, self.step = run, stage, seconds, step
        self.began = self.last = time.monotonic()
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def add(self, report: dict[str, torch.Tensor]) -> None:
        for name, value in report.items():
            number = float(value.detach())
            if math.isfinite(number):  # an accuracy over nothing is not a number
                self.sums[name] = self.sums.get(name, 0.0) + number
                self.counts[name] = self.counts.get(name, 0) + 1

    def write(self, step: int, factor: float) -> None:
        now = time.monotonic()
        if self.run.rank == 0:
            line = {
                "stage": self.stage.name,
                "step": step,
                "seconds": round(self.seconds(), 1),
                "pictures_a_second": round((step - self.step) * self.stage.batch / (now - self.last), 2),
                "rate": round(factor, 4),
                **{name: round(total / self.counts[name], 4) for name, total in self.sums.items()},
            }
            with (self.run.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.sums, self.counts = {}, {}
        self.last, self.step = now, step
