"""What a model pays attention to over samples: sums that are kept on the disk, and memory for one sample at a time.

Three kinds of passes go over the samples: one unpruned, for what visual tokens receive in every layer; one for each
alpha that a search visits; one for what a recipe loses. A pass writes what it has added up every few seconds; stopped
at any time, it goes on where it was and ends in the same sums.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.files import atomic_write, cache_folder
from llava.fitting.fitprune.observation import send
from llava.fitting.fitprune.samples import Sample, Samples, digest_of
from llava.fitting.fitprune.search import Walk, kept_by
from llava.pruning.base import kept_count
from llava.pruning.methods.fitprune.pruner import deletable, importance
from llava.pruning.methods.fitprune.recipe import model_fingerprint

VERSION = 1
"""Of what the sums mean: a new one makes them anew."""

SECONDS_BETWEEN_SAVES = 10.0


class Statistics:
    """A model's attention over samples, gathered when it is first asked for.

    Parameters
    ----------
    model
        A loaded LLaVA, unpruned.
    image_processor
    samples : Samples
    root : Path
        The sums get a folder of their own below it, by model and samples.
    """

    def __init__(self, model, image_processor, samples: Samples, root: Path):
        self.model, self.image_processor, self.samples = model, image_processor, samples
        self.layers: int = model.config.num_hidden_layers
        self.facts = {
            "version": VERSION,
            "model": model_fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "data": samples.facts(),
        }
        self.folder = root / digest_of(self.facts)

    def unpruned(self) -> np.ndarray:
        """What an image's visual tokens receive in all, in every layer of the unpruned model.

        Returns
        -------
        ndarray (S, L, 2), float64, mapped from the disk
            From the visual tokens and from the text behind the image, both averaged over those that pay.

        Raises
        ------
        ValueError
            If a sample cannot be used; the message names it. If the folder's sums are of another model, or other data.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file, about = self.folder / "unpruned.npy", self.folder / "about.json"
        if about.exists() and (found := json.loads(about.read_text(encoding="utf-8"))) != self.facts:
            raise ValueError(
                f"the statistics in {self.folder} are of another model or other data, {found}, not {self.facts}: "
                "delete them, or name another folder"
            )
        if not file.exists():
            _replace(about, self.facts)
            (self.folder / "unpruned.json").unlink(missing_ok=True)
            shape = (len(self.samples), self.layers, 2)
            np.lib.format.open_memmap(file, mode="w+", dtype=np.float64, shape=shape).flush()

        def observe(number: int, sample: Sample) -> list[int]:
            rows = np.load(file, mmap_mode="r+", allow_pickle=False)

            def look(layer: int, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                rows[number, layer] = _sum(visual), _sum(text)
                return torch.ones_like(visual, dtype=torch.bool)

            self._send(sample, look)
            rows.flush()
            return [sample.text]

        self._add_up("unpruned", 1, observe)
        return np.load(file, mmap_mode="r", allow_pickle=False)

    def text_tokens(self) -> float:
        """Mean number of text tokens of a prompt."""
        self.unpruned()
        return _read(self.folder / "unpruned.json", 1)[1][0] / len(self.samples)

    def walk(self, alpha: float) -> Walk:
        """What is left behind each layer if all drop what is `deletable` at ``alpha``."""
        unpruned = self.unpruned()

        def observe(number: int, sample: Sample) -> list[int]:
            kept: list[int] = []

            def look(layer: int, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                stays = ~deletable(visual, text, tuple(unpruned[number, layer].tolist()), alpha)
                kept.extend([int(stays.sum())] if kept else [len(stays), int(stays.sum())])
                return stays

            self._send(sample, look)
            return [*kept, *(n * n for n in kept)]

        width = self.layers + 1
        sums = self._add_up(f"walk-{alpha:.8g}", 2 * width, observe)
        return Walk(len(self.samples), sums[:width], sums[width:])

    def divergence(self, deleted: Sequence[int], tokens: int) -> dict[str, list[float]]:
        """What a recipe, applied as it will be, takes away from the attention over visual tokens.

        Parameters
        ----------
        deleted : sequence of int
            Tokens that leave in each layer, of ``tokens``.

        Returns
        -------
        dict
            "visual" and "text", one number a layer: the share of what the unpruned model's visual tokens receive which
            those that are left do not (0 where they receive more), averaged over the samples.
        """
        unpruned = self.unpruned()
        fractions = [n / tokens for n in kept_by(deleted, tokens)]

        def observe(number: int, sample: Sample) -> list[float]:
            total = 0
            lost: dict[str, list[float]] = {"visual": [], "text": []}

            def look(layer: int, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                nonlocal total
                total = total or len(visual)
                order = importance(visual, text).argsort(descending=True, stable=True)
                stays = torch.zeros_like(visual, dtype=torch.bool)
                stays[order[: kept_count(total, fractions[layer + 1])]] = True
                for name, now, before in zip(lost, (visual, text), unpruned[number, layer].tolist(), strict=True):
                    lost[name].append(max(0.0, 1 - _sum(now[stays]) / before) if before else 0.0)
                return stays

            self._send(sample, look)
            return [*lost["visual"], *lost["text"]]

        sums = self._add_up(f"recipe-{digest_of(list(deleted), tokens)}", 2 * self.layers, observe)
        means = [value / len(self.samples) for value in sums]
        return {"visual": means[: self.layers], "text": means[self.layers :]}

    def _send(self, sample: Sample, look) -> None:
        send(self.model, self.image_processor, sample, look)

    def _add_up(self, name: str, width: int, observe: Callable[[int, Sample], list]) -> list:
        """Sum what ``observe`` says of each sample; samples that are on the disk are not sent again."""
        from tqdm import tqdm

        file = self.folder / f"{name}.json"
        done, sums = _read(file, width)
        if done == len(self.samples):
            return sums
        saved = time.monotonic()
        # Without a terminal, no bar.
        with tqdm(total=len(self.samples), initial=done, desc=f"FitPrune, {name}", unit="sample", disable=None) as bar:
            for number in range(done, len(self.samples)):
                sums = [a + b for a, b in zip(sums, observe(number, self.samples[number]), strict=True)]
                bar.update()
                if number + 1 == len(self.samples) or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    _replace(file, {"samples": number + 1, "sums": sums})
                    saved = time.monotonic()
        return sums


def _sum(attention: torch.Tensor) -> float:
    return float(attention.double().sum())


def _read(file: Path, width: int) -> tuple[int, list]:
    """Samples done, and the sums over them."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0, [0] * width
    return content["samples"], content["sums"]


def _replace(file: Path, content: dict[str, Any]) -> None:
    atomic_write(file, json.dumps(content) + "\n")


def cache_root() -> Path:
    """``otprune/fitprune`` in the user's cache folder."""
    return cache_folder().absolute() / "fitprune"
