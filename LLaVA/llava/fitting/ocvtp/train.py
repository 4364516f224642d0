"""Training a pruner: seeded, resumable bit for bit, in one process or in several that accelerate starts.

Everything random about a step comes from the seed and the step's number, so the whole state of a run is the weights,
the optimiser and the step.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from llava.files import atomic_write
from llava.fitting.ocvtp.features import Description, Features
from llava.fitting.ocvtp.objective import Draws, Reconstruction, seed_of, seeded
from llava.fitting.ocvtp.record import draw_curve, read_log, write_log
from llava.pruning.methods.ocvtp.config import SlotConfig

STATE = "state.pt"
WARMUP_RATE, FINAL_RATE = 1e-6, 1e-8


@dataclass(frozen=True)
class Recipe:
    """How a pruner is trained; the defaults are the published recipe.

    Attributes
    ----------
    slots : int
        Of the validation. A training step takes a quarter, half, one or two times as many.
    epochs, warmup : int
        Epochs in all, and those in which the learning rate rises.
    batch : int
        Pictures a step, over all processes.
    learning_rate, weight_decay, clip : float
        Of AdamW, and the largest norm of a step's gradient.
    validation : float
        Share of the pictures that is held out.
    patience : int
        Epochs without a better validation loss after which the run ends.
    seed : int

    Raises
    ------
    ValueError
        For a warm-up that does not end.
    """

    slots: int = 64
    epochs: int = 30
    warmup: int = 4
    batch: int = 12
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    validation: float = 0.05
    patience: int = 5
    seed: int = 42

    def __post_init__(self):
        if not 0 <= self.warmup < self.epochs:
            raise ValueError(f"--warmup {self.warmup}: must be at least 0 and below --epochs {self.epochs}")

    def slot_choices(self, tokens: int) -> list[int]:
        """The numbers of slots that a step draws from.

        Raises
        ------
        ValueError
            If there are more slots than tokens.
        """
        if self.slots > tokens:
            raise ValueError(f"--slots {self.slots}: the features have {tokens} tokens a picture, and so many at most")
        return [n for n in (self.slots // 4, self.slots // 2, self.slots, 2 * self.slots) if 1 <= n <= tokens]

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0: a linear rise, then a cosine's fall."""
        if epoch < self.warmup:
            return WARMUP_RATE + epoch * (self.learning_rate - WARMUP_RATE) / self.warmup
        half = (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return FINAL_RATE + (self.learning_rate - FINAL_RATE) * half


@dataclass(frozen=True)
class Run:
    """Where a pruner is trained, and for how long.

    Attributes
    ----------
    folder : Path
        Gets the pruner with the best validation loss, ``log.jsonl``, ``loss.png`` and ``state.pt``.
    resume : bool
    seconds : float
        After which the state is saved and the run left.
    precision : str
        "no" or "bf16": of matrix products.
    dtype : str
        Of the saved pruner's weights.
    save_seconds : float
        How often the state is saved.
    quiet : bool
        No progress bar.
    """

    folder: Path
    resume: bool = False
    seconds: float = math.inf
    precision: str = "no"
    dtype: str = "float32"
    save_seconds: float = 180.0
    quiet: bool = False


@dataclass
class _Progress:
    """How far a run is: the part of its state that is neither weights nor optimiser."""

    step: int = 0
    best: float = math.inf
    stale: int = 0
    total: float = 0.0

    @property
    def fields(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def split(count: int, recipe: Recipe) -> tuple[list[int], list[int]]:
    """Which pictures are trained on and which are held out.

    Raises
    ------
    ValueError
        If there are too few for a step.
    """
    order = torch.randperm(count, generator=seeded(recipe.seed, "split")).tolist()
    held_out = max(1, round(recipe.validation * count))
    if count - held_out < recipe.batch:
        raise ValueError(
            f"{count} pictures are too few: {held_out} are held out, and a step takes --batch-size {recipe.batch}"
        )
    return order[held_out:], order[:held_out]


def train(folder: Path, sizes: Callable[[Description], SlotConfig], recipe: Recipe, run: Run) -> bool:
    """Train a pruner on a folder of features, from its last saved state or from nothing.

    Parameters
    ----------
    folder : Path
        Of `extract`.
    sizes : callable
        The network for features of a description.
    recipe : Recipe
    run : Run

    Returns
    -------
    bool
        True when the run is complete, False when its time was up; the state is saved in both cases.

    Raises
    ------
    OSError, ValueError
        If the features are missing or others than those of the run to resume, or the recipe does not fit them.
    FloatingPointError
        If a loss is not finite.
    """
    return _Training(folder, sizes, recipe, run).go()


class _Training:
    def __init__(self, folder: Path, sizes: Callable[[Description], SlotConfig], recipe: Recipe, run: Run):
        self.began = self.saved = time.monotonic()
        self.recipe, self.run = recipe, run
        self.features = Features(folder)
        self.config = sizes(self.features.description)
        self.choices = recipe.slot_choices(self.config.decoder.tokens)
        self.training, self.held_out = split(len(self.features), recipe)
        state = self._state()
        self.accelerator = Accelerator(mixed_precision=run.precision)
        if recipe.batch % self.accelerator.num_processes:
            raise ValueError(
                f"--batch-size {recipe.batch} does not divide by {self.accelerator.num_processes} processes"
            )
        self.epoch_steps = len(self.training) // recipe.batch
        torch.manual_seed(seed_of(recipe.seed, "weights"))
        task = Reconstruction(self.config)
        optimizer = torch.optim.AdamW(task.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.progress, self.lines = _Progress(), []
        if state is not None:
            task.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.progress = _Progress(**state["progress"])
            done = self.progress.step // self.epoch_steps
            self.lines = [line for line in read_log(run.folder) if line["epoch"] <= done]
        self.task, self.optimizer = self.accelerator.prepare(task, optimizer)

    @property
    def _identity(self) -> dict[str, object]:
        """What must be the same when a run is resumed."""
        described = dataclasses.asdict(self.features.description)
        return {
            **{name: described[name] for name in ("model", "layer", "tokens", "width", "pictures", "count")},
            **dataclasses.asdict(self.recipe),
            **{f"network {name}": value for name, value in dataclasses.asdict(self.config).items()},
        }

    def _state(self) -> dict | None:
        file = self.run.folder / STATE
        if not self.run.resume:
            if file.exists():
                raise ValueError(f"{self.run.folder} holds a run: give --resume, or another --output")
            return None
        if not file.is_file():
            raise OSError(f"{self.run.folder} holds no run to resume (no {STATE})")
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            identity = state["identity"]
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise OSError(f"Cannot read the run in {file}: {reason}") from error
        for name, value in self._identity.items():
            if identity.get(name) != value:
                raise ValueError(
                    f"{self.run.folder} was trained with {name} {identity.get(name)}, not {value}: the same "
                    "features and options are needed to resume it"
                )
        return state

    def go(self) -> bool:
        recipe, progress = self.recipe, self.progress
        self.run.folder.mkdir(parents=True, exist_ok=True)
        total = recipe.epochs * self.epoch_steps
        hidden = self.run.quiet or not self.accelerator.is_main_process
        with tqdm(total=total, initial=progress.step, desc="training", unit="step", disable=hidden or None) as bar:
            while progress.step < total and progress.stale < recipe.patience:
                epoch = progress.step // self.epoch_steps
                order = torch.randperm(len(self.training), generator=seeded(recipe.seed, "epoch", epoch)).tolist()
                while progress.step < (epoch + 1) * self.epoch_steps:
                    first = (progress.step - epoch * self.epoch_steps) * recipe.batch
                    loss = self._step([self.training[i] for i in order[first : first + recipe.batch]], epoch)
                    progress.total += loss
                    progress.step += 1
                    bar.update()
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    ends = progress.step % self.epoch_steps == 0
                    if ends:
                        self._end_epoch(epoch)
                    if ends or self._due():
                        self._save()
                    if self._late() and progress.step < total:
                        self._save()
                        print(f"stopped after {progress.step} of {total} steps; --resume goes on", file=sys.stderr)
                        return False
        return True

    def _step(self, pictures: list[int], epoch: int) -> float:
        """One optimiser step; the mean loss over all processes."""
        recipe, accelerator, step = self.recipe, self.accelerator, self.progress.step
        self.task.train()
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(epoch)
        generator = seeded(recipe.seed, "step", step)
        slots = self.choices[int(torch.randint(len(self.choices), (1,), generator=generator))]
        draws = Draws.sample(generator, recipe.batch, slots, self.config)
        share = recipe.batch // accelerator.num_processes
        own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        # Dropout.
        torch.manual_seed(seed_of(recipe.seed, "dropout", step, accelerator.process_index))
        loss = self.task(self._load(pictures[own]), *draws.rows(own, accelerator.device)).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(self.task.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mean = float(accelerator.reduce(loss.detach(), "mean"))
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss of step {step} is {mean}")
        return mean

    @torch.no_grad()
    def _validate(self) -> float:
        """The training's own error on the pictures held out, with draws that never change.

        Some tokens are hidden here as well: a decoder that sees them all has nothing to ask of the slots.
        """
        recipe, accelerator = self.recipe, self.accelerator
        self.task.eval()
        errors = torch.zeros(2, device=accelerator.device)
        starts = range(0, len(self.held_out), recipe.batch)
        for number, first in list(enumerate(starts))[accelerator.process_index :: accelerator.num_processes]:
            pictures = self.held_out[first : first + recipe.batch]
            generator = seeded(recipe.seed, "validation", number)
            draws = Draws.sample(generator, len(pictures), recipe.slots, self.config)
            error = self.task(self._load(pictures), *draws.rows(slice(None), accelerator.device))
            errors += torch.stack([error.sum(), torch.tensor(float(len(pictures)), device=error.device)])
        total, count = accelerator.reduce(errors, "sum").tolist()
        return total / count

    def _end_epoch(self, epoch: int) -> None:
        progress = self.progress
        validation = self._validate()
        better = validation < progress.best
        progress.best, progress.stale = min(validation, progress.best), 0 if better else progress.stale + 1
        line = {
            "epoch": epoch + 1,
            "step": progress.step,
            "rate": self.recipe.rate(epoch),
            "loss": progress.total / self.epoch_steps,
            "validation": validation,
        }
        progress.total = 0.0
        self.lines.append(line)
        if not self.accelerator.is_main_process:
            return
        if better:
            self._export(line)
        write_log(self.run.folder, self.lines)
        draw_curve(self.run.folder, self.lines)

    def _export(self, line: dict[str, float]) -> None:
        described = self.features.description
        pruner = self.accelerator.unwrap_model(self.task).pruner
        told = {
            "model": described.model,
            "pictures": described.pictures,
            "count": described.count,
            **{name: line[name] for name in ("epoch", "step", "loss", "validation")},
            "recipe": dataclasses.asdict(self.recipe),
        }
        pruner.config = dataclasses.replace(self.config, trained_on=told)
        pruner.save_pretrained(self.run.folder, getattr(torch, self.run.dtype))

    def _load(self, pictures: list[int]) -> torch.Tensor:
        batch = torch.stack([self.features[number] for number in pictures])
        return batch.to(device=self.accelerator.device, dtype=torch.float32)

    def _due(self) -> bool:
        return time.monotonic() - self.saved > self.run.save_seconds

    def _late(self) -> bool:
        """Whether any process is past its time."""
        late = torch.tensor(float(time.monotonic() - self.began > self.run.seconds), device=self.accelerator.device)
        return float(self.accelerator.reduce(late, "sum")) > 0

    def _save(self) -> None:
        self.saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        state = {
            "model": self.accelerator.unwrap_model(self.task).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": self.progress.fields,
            "identity": self._identity,
        }
        atomic_write(self.run.folder / STATE, lambda part: torch.save(state, part))
