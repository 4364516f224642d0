"""Training a scorer to predict what a model attends to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from llava.command import RATIO
from llava.fitting.scorer.attention import Attention
from llava.pruning import kept_count
from llava.pruning.methods.scorer import MODEL_TYPE, TokenScorer
from llava.pruning.methods.trained import save_network
from llava.train.loop import Run, Trainer


@dataclass(frozen=True)
class Recipe:
    """How a scorer is trained.

    Attributes
    ----------
    hidden : int
        Width of the network.
    epochs, batch : int
        Epochs, and images per step over all processes.
    learning_rate, weight_decay : float
        Of AdamW; the rate falls linearly to zero.
    validation : float
        Share of the images that is held out, the last ones.
    seed : int
    """

    hidden: int = 128
    epochs: int = 20
    batch: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    validation: float = 0.1
    seed: int = 0


class Prediction(nn.Module):
    """The scorer, and how far its prediction is from the attention."""

    def __init__(self, scorer: TokenScorer):
        super().__init__()
        self.scorer = scorer

    def forward(self, features: torch.Tensor, attention: torch.Tensor) -> dict[str, torch.Tensor]:
        """The divergence of the prediction from the attention (B, N), over the patches, averaged over images.

        Features (B, N, C) are zeros for padding; what patches receive counts, as shares of its sum.
        """
        patches = features.any(dim=-1)
        predicted = self.scorer(features).log_softmax(dim=-1).masked_fill(~patches, 0.0)
        attention = attention * patches
        attention = attention / attention.sum(dim=-1, keepdim=True)
        divergence = torch.special.xlogy(attention, attention) - attention * predicted
        return {"divergence": divergence.sum(dim=-1).mean()}


def collate(examples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of different sizes, padded."""
    features, attention = zip(*examples, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(list(features), batch_first=True), pad(list(attention), batch_first=True)


def train(folder: Path, recipe: Recipe, run: Run) -> bool:
    """Train a scorer on a folder of `gather`, from its last saved state or from nothing.

    True when the run is complete and ``run.folder`` holds the scorer, False when its time was up. An OSError or
    ValueError if the folder is incomplete or other than that of the run to resume, or holds too few images.
    """
    data = Attention(folder)
    held_out = max(1, round(recipe.validation * len(data)))
    count = len(data) - held_out
    if count < recipe.batch:
        raise ValueError(f"{len(data)} images are too few: {held_out} are held out, a step takes {recipe.batch}")
    model, epoch_steps = data.description["model"], count // recipe.batch
    torch.manual_seed(recipe.seed)
    task = Prediction(TokenScorer(model["width"], recipe.hidden))
    optimizer = torch.optim.AdamW(task.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    trainer = Trainer(
        task,
        [optimizer],
        dataclasses.replace(run, seed=recipe.seed, log_steps=epoch_steps),
        settings={**dataclasses.asdict(recipe), **model, **data.description["data"]},
    )
    order = [
        number
        for epoch in range(recipe.epochs)
        for number in torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).tolist()[
            : epoch_steps * recipe.batch
        ]
    ]
    steps = recipe.epochs * epoch_steps
    scores: dict[str, float] = {}

    def validate(line: dict[str, Any]) -> None:
        scorer = trainer.accelerator.unwrap_model(trainer.task).scorer
        scores.update(evaluate(scorer, Subset(data, range(count, len(data))), trainer.accelerator.device))
        line |= scores

    batches = trainer.batches(data, order, recipe.batch, steps, collate)
    if not trainer.fit(batches, steps, lambda step: 1 - step / steps, validate):
        return False
    if trainer.accelerator.is_main_process:
        scorer = trainer.accelerator.unwrap_model(trainer.task).scorer
        trained_on = {**data.description, "recipe": dataclasses.asdict(recipe), **scores}
        save_scorer(scorer, run.folder, trained_on)
    return True


@torch.no_grad()
def evaluate(scorer: TokenScorer, data, device: torch.device | str = "cpu") -> dict[str, float]:
    """On images that were held out: the share of the attention that the kept tokens receive, and the most there is.

    "kept_attention", with the scorer's tokens at the usual kept ratio; "most_attention", with the best ones;
    "random_attention", the ratio itself.
    """
    kept, most, share = 0.0, 0.0, 0.0
    for features, attention in data:
        k = kept_count(len(attention), RATIO)
        chosen = scorer.eval()(features[None].to(device))[0].topk(k).indices.cpu()
        kept += float(attention[chosen].sum())
        most += float(attention.topk(k).values.sum())
        share += k / len(attention)
    return {
        "kept_attention": kept / len(data),
        "most_attention": most / len(data),
        "random_attention": share / len(data),
    }


def save_scorer(scorer: TokenScorer, folder: Path, trained_on: dict[str, Any]) -> None:
    """Write a scorer's folder, with weights in bfloat16."""
    config = {"model_type": MODEL_TYPE, "width": scorer.width, "hidden": scorer.hidden, "trained_on": trained_on}
    save_network(scorer, folder, torch.bfloat16, config)
