"""Training a pruner on a folder of features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava.fitting.ocvtp.features import Description, Features
from llava.fitting.ocvtp.objective import DecoderConfig, Draws, Reconstruction, seeded
from llava.pruning.methods.ocvtp.network import MODEL_TYPE, SlotConfig, SlotPruner
from llava.pruning.methods.trained import save_network
from llava.train.loop import Run, Trainer, read_log, seed_of

WARMUP_RATE, FINAL_RATE = 1e-6, 1e-8


@dataclass(frozen=True)
class Recipe:
    """How a pruner is trained; the defaults are the published recipe. A ValueError for a warm-up that does not end.

    Attributes
    ----------
    slots : int
        Of the validation. A training step takes a quarter, half, one or two times as many.
    epochs, warmup : int
        Epochs in all, and those in which the learning rate rises.
    batch : int
        Images a step, over all processes.
    learning_rate, weight_decay, clip : float
        Of AdamW, and the largest norm of a step's gradient.
    validation : float
        Share of the images that is held out.
    patience : int
        Epochs without a better validation loss after which the run ends.
    seed : int
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
        """The numbers of slots that a step draws from; a ValueError if there are more slots than tokens."""
        if self.slots > tokens:
            raise ValueError(f"--slots {self.slots}: the features have {tokens} tokens per image, and so many at most")
        return [n for n in (self.slots // 4, self.slots // 2, self.slots, 2 * self.slots) if 1 <= n <= tokens]

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0: a linear rise, then a cosine's fall."""
        if epoch < self.warmup:
            return WARMUP_RATE + epoch * (self.learning_rate - WARMUP_RATE) / self.warmup
        half = (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return FINAL_RATE + (self.learning_rate - FINAL_RATE) * half


def split(count: int, recipe: Recipe) -> tuple[list[int], list[int]]:
    """Which images are trained on and which are held out; a ValueError if there are too few for a step."""
    order = torch.randperm(count, generator=seeded(recipe.seed, "split")).tolist()
    held_out = max(1, round(recipe.validation * count))
    if count - held_out < recipe.batch:
        raise ValueError(
            f"{count} images are too few: {held_out} are held out, and a step takes --batch-size {recipe.batch}"
        )
    return order[held_out:], order[:held_out]


def train(
    folder: Path, sizes: Callable[[Description], SlotConfig], recipe: Recipe, run: Run, dtype: str = "float32"
) -> bool:
    """Train a pruner on a folder of `extract`, from its last saved state or from nothing.

    ``sizes`` gives the network for features of a description. The run's folder gets the pruner with the best validation
    loss, with weights of ``dtype``. True when the run is complete, False when its time was up; the state is saved in
    both cases. An OSError, ValueError or FloatingPointError if the features are missing or others than those of the run
    to resume, the recipe does not fit them, or a loss is not finite.
    """
    features = Features(folder)
    described, config = features.description, sizes(features.description)
    choices = recipe.slot_choices(DecoderConfig.of(config).tokens)
    training, held_out = split(len(features), recipe)
    epoch_steps = len(training) // recipe.batch
    torch.manual_seed(seed_of(recipe.seed, "weights"))
    task = Reconstruction(config)
    trainer = Trainer(
        task,
        [torch.optim.AdamW(task.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)],
        dataclasses.replace(run, seed=recipe.seed, log_steps=epoch_steps),
        clip=recipe.clip,
        losses=lambda errors: {"loss": errors.mean()},
        settings={
            **{name: getattr(described, name) for name in ("model", "layer", "tokens", "width", "pictures", "count")},
            **dataclasses.asdict(recipe),
            **{f"network {name}": value for name, value in dataclasses.asdict(config).items()},
        },
    )
    accelerator, share = trainer.accelerator, trainer.share(recipe.batch)
    own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    epochs = [line for line in read_log(run.folder) if line["step"] <= trainer.step]
    steps = recipe.epochs * epoch_steps

    def load(images: list[int]) -> torch.Tensor:
        return torch.stack([features[number] for number in images]).float()

    def batches() -> Iterator[tuple[torch.Tensor, ...]]:
        order: list[int] = []
        for step in range(trainer.step, steps):
            epoch, place = divmod(step, epoch_steps)
            if place == 0 or not order:
                order = torch.randperm(len(training), generator=seeded(recipe.seed, "epoch", epoch)).tolist()
            images = [training[i] for i in order[place * recipe.batch : (place + 1) * recipe.batch]]
            generator = seeded(recipe.seed, "step", step)
            slots = choices[int(torch.randint(len(choices), (1,), generator=generator))]
            yield load(images[own]), *Draws.sample(generator, recipe.batch, slots, config).rows(own)

    @torch.no_grad()
    def validate() -> float:
        """The training's own error on the images held out, with draws that never change.

        Some tokens are hidden here as well: a decoder that sees them all has nothing to ask of the slots.
        """
        trainer.task.eval()
        total = torch.zeros(2, device=accelerator.device)
        starts = range(0, len(held_out), recipe.batch)
        for number, first in list(enumerate(starts))[accelerator.process_index :: accelerator.num_processes]:
            images = held_out[first : first + recipe.batch]
            draws = Draws.sample(seeded(recipe.seed, "validation", number), len(images), recipe.slots, config)
            batch = (load(images), *draws.rows(slice(None)))
            errors = trainer.task(*(part.to(accelerator.device) for part in batch))
            total += torch.stack([errors.sum(), errors.new_tensor(len(images))])
        error, count = accelerator.reduce(total, "sum").tolist()
        return error / count

    def ends_epoch(line: dict[str, Any]) -> bool:
        line |= {"epoch": len(epochs) + 1, "validation": validate()}
        epochs.append(line)
        if accelerator.is_main_process and line is best(epochs):
            export(line)
        return stale(epochs)

    def export(line: dict[str, Any]) -> None:
        pruner = accelerator.unwrap_model(trainer.task).pruner
        trained_on = {
            **{name: getattr(described, name) for name in ("model", "pictures", "count")},
            **{name: line[name] for name in ("epoch", "step", "loss", "validation")},
            "recipe": dataclasses.asdict(recipe),
        }
        pruner.config = dataclasses.replace(config, trained_on=trained_on)
        save_pruner(pruner, run.folder, getattr(torch, dtype))

    def stale(lines: list[dict[str, Any]]) -> bool:
        return bool(lines) and len(lines) - best(lines)["epoch"] >= recipe.patience

    rates = [recipe.rate(epoch) / recipe.learning_rate for epoch in range(recipe.epochs)]
    return stale(epochs) or trainer.fit(batches(), steps, lambda step: rates[step // epoch_steps], ends_epoch)


def save_pruner(pruner: SlotPruner, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a pruner's folder, with weights of a dtype."""
    save_network(pruner, folder, dtype, {"model_type": MODEL_TYPE, **dataclasses.asdict(pruner.config)})


def best(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The epoch with the lowest validation loss, the first of equals."""
    return min(lines, key=lambda line: line["validation"])
