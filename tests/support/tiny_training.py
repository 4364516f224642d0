"""A task, its data and a run of it for `test_train_loop`, here because processes that are started import it."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.utils.data import TensorDataset

from llava.train.loop import Run, Trainer

STEPS, SIZE, ACCUMULATE = 11, 8, 2


class Task(nn.Module):
    """A body, and a head that only every third step uses; dropout makes every step draw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.3), nn.Linear(16, 1))
        self.head = nn.Linear(5, 1)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x, y, number):
        out = self.body(x) + (self.head(x) if number[0] // SIZE % 3 == 0 else 0)
        return {"error": (out - y).square().mean(), "only/logged": out.mean()}


class Killed(Exception):
    """What ends a process between any two batches."""


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * SIZE, 5, generator=generator)
    return TensorDataset(x, x.sum(dim=1, keepdim=True), torch.arange(len(x)))


def optimizers(task: Task) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(task.body.parameters(), 1e-2), torch.optim.SGD(task.head.parameters(), 1e-2, momentum=0.9)]


def train(folder, killed_after=None, task=None, **settings) -> tuple[Trainer, bool]:
    task = Task() if task is None else task
    run = Run(folder, log_steps=4, cpu=True, **settings)
    trainer = Trainer(task, optimizers(task), run, accumulate=ACCUMULATE)
    batches = trainer.batches(data(), range(STEPS * SIZE), SIZE, STEPS)

    def until_killed():
        for number, batch in enumerate(batches):
            if number == killed_after:
                raise Killed
            yield batch

    return trainer, trainer.fit(until_killed(), STEPS, lambda step: 1 - step / STEPS)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.accelerator.unwrap_model(trainer.task).state_dict().items()}


def process(rank: int, folder, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    task = Task()
    task.body[1].p = 0.0
    trainer, _ = train(folder, task=task)
    if rank == 0:
        torch.save(weights(trainer), folder / "weights.pt")
