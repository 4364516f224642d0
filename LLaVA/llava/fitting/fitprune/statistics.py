"""What a model pays attention to over samples: a few numbers per sample, kept on the disk, and one image at a time.

Three kinds of passes go over the samples: one unpruned, for what visual tokens receive in every layer; one for each
alpha that a search visits; one for what a recipe loses. A pass writes its rows every few seconds; stopped at any time,
it continues where it was and ends in the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from llava.files import atomic_write, cache_folder, write_json
from llava.fitting.data import digest_of
from llava.fitting.fitprune.search import Walk, kept_by
from llava.fitting.prompts import Look, Prompt, Prompts, send
from llava.pruning.methods.fitprune.pruner import deletable, importance
from llava.pruning.methods.fitprune.recipe import model_fingerprint
from llava.pruning.schedule import kept_count

VERSION = 2
"""Of what the rows mean: a new one makes them anew."""

SECONDS_BETWEEN_SAVES = 10.0


class Statistics:
    """A loaded, unpruned LLaVA's attention over prompts, gathered when it is first asked for.

    The numbers get a folder of their own below ``root``, by model and prompts; ``about.json`` there names both.
    """

    def __init__(self, model, image_processor, prompts: Prompts, root: Path):
        self.model, self.image_processor, self.prompts = model, image_processor, prompts
        self.layers: int = model.config.num_hidden_layers
        self.metadata = {
            "version": VERSION,
            "model": model_fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "data": prompts.metadata(),
        }
        self.folder = root / digest_of(self.metadata)

    def unpruned(self) -> np.ndarray:
        """What an image's visual tokens receive in all, in every layer of the unpruned model: (S, L, 2), float64.

        From the visual tokens and from the text after the image, both averaged over those that pay. An OSError or
        ValueError names a sample that cannot be used.
        """
        return self._unpruned()[:, :-1].reshape(-1, self.layers, 2)

    def text_tokens(self) -> float:
        """Mean number of text tokens of a prompt."""
        return float(self._unpruned()[:, -1].mean())

    def walk(self, alpha: float) -> Walk:
        """What is left after each layer if all drop what is `deletable` at ``alpha``."""
        unpruned = self.unpruned()

        def observe(number: int, prompt: Prompt) -> list[int]:
            kept: list[int] = []

            def look(layer: int, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                stays = ~deletable(visual, text, tuple(unpruned[number, layer].tolist()), alpha)
                kept.extend([int(stays.sum())] if kept else [len(stays), int(stays.sum())])
                return stays

            self._send(prompt, look)
            return kept

        rows = self._pass(f"walk-{alpha:.8g}", observe).astype(np.int64)
        return Walk(len(rows), rows.sum(0).tolist(), np.square(rows).sum(0).tolist())

    def divergence(self, deleted: Sequence[int], tokens: int) -> dict[str, list[float]]:
        """What a recipe, applied as it will be, takes away from the attention over visual tokens.

        ``deleted`` states how many of ``tokens`` leave in each layer. The result has "visual" and "text", one number
        per layer: the share of what the unpruned model's visual tokens receive which those that are left do not (0
        where they receive more), averaged over the samples.
        """
        unpruned = self.unpruned()
        fractions = [n / tokens for n in kept_by(deleted, tokens)]

        def observe(number: int, prompt: Prompt) -> list[float]:
            total, lost = 0, []

            def look(layer: int, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                nonlocal total
                total = total or len(visual)
                order = importance(visual, text).argsort(descending=True, stable=True)
                stays = torch.zeros_like(visual, dtype=torch.bool)
                stays[order[: kept_count(total, fractions[layer + 1])]] = True
                for now, before in zip((visual, text), unpruned[number, layer].tolist(), strict=True):
                    lost.append(max(0.0, 1 - _sum(now[stays]) / before) if before else 0.0)
                return stays

            self._send(prompt, look)
            return lost

        means = self._pass(f"recipe-{digest_of(list(deleted), tokens)}", observe).mean(0).reshape(self.layers, 2)
        return {"visual": means[:, 0].tolist(), "text": means[:, 1].tolist()}

    def _unpruned(self) -> np.ndarray:
        def observe(number: int, prompt: Prompt) -> list[float]:
            sums: list[float] = []

            def look(layer: int, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                sums.extend((_sum(visual), _sum(text)))
                return torch.ones_like(visual, dtype=torch.bool)

            self._send(prompt, look)
            return [*sums, prompt.text]

        return self._pass("unpruned", observe)

    def _send(self, prompt: Prompt, look: Look) -> None:
        send(self.model, self.image_processor, prompt, look)

    def _pass(self, name: str, observe: Callable[[int, Prompt], Sequence[float]]) -> np.ndarray:
        """What ``observe`` makes of every prompt: (S, ...), float64; those on the disk are not sent again."""
        file = self.folder / f"{name}.npy"
        rows = np.load(file).tolist() if file.is_file() else []
        if not rows:
            write_json(self.folder / "about.json", self.metadata)

        def write(part: Path) -> None:
            with part.open("wb") as stream:
                np.save(stream, np.array(rows, dtype=np.float64))

        count, saved = len(self.prompts), time.monotonic()
        with tqdm(total=count, initial=len(rows), desc=f"FitPrune, {name}", unit="sample", disable=None) as bar:
            for number in range(len(rows), count):
                rows.append(observe(number, self.prompts[number]))
                bar.update()
                if number + 1 == count or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    atomic_write(file, write)
                    saved = time.monotonic()
        return np.array(rows, dtype=np.float64)


def cache_root() -> Path:
    """``otprune/fitprune`` in the user's cache folder."""
    return cache_folder().absolute() / "fitprune"


def _sum(attention: torch.Tensor) -> float:
    return float(attention.double().sum())
