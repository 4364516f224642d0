"""A synthetic run in POPE's shape: many questions about each picture, a short answer each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from llava.eval.latency.clock import synchronize
from llava.eval.latency.methods import UNPRUNED
from llava.eval.latency.models import prompts
from llava.model.visual_cache import VisualCache
from llava.pruning import PruningConfig

NEW_TOKENS = 2
"""Tokens of "Yes" and the end of the answer."""


@dataclass(frozen=True)
class Setting:
    """How a run is made: prompts that are generated together, and whether encoded images are remembered."""

    batch: int
    cached: bool


def measure(
    model: torch.nn.Module,
    configs: Mapping[str, PruningConfig],
    *,
    images: int,
    questions: int,
    batches: Sequence[int],
    cache_bytes: int,
    images_one_by_one: int | None = None,
) -> list[dict[str, Any]]:
    """Answer ``questions`` about each of ``images`` pictures, with every batch size, with and without a cache.

    Parameters
    ----------
    model
    configs : mapping
        Method -> configuration; unpruned runs as well.
    images, questions : int
    batches : sequence of int
        Batch 1 without a cache, to which all is compared, runs in any case.
    cache_bytes : int
        What the cache may hold.
    images_one_by_one : int, optional
        How many of the pictures the runs of batch 1 ask about, whose samples a second do not depend on it.

    Returns
    -------
    list of dict
        One a method and setting: "method", "batch", "cached", "seconds", "samples_per_second", "times_plain" (samples a
        second, over those of the same method in batches of 1 without a cache), "times_unpruned" (over those of the
        unpruned model so), "samples", "hits", "misses", and "same_answers", the share equal to that first run's, of
        what that run was asked.
    """
    settings = dict.fromkeys(Setting(batch, cached) for batch in (1, *batches) for cached in (False, True))
    pairs = [(image, image * questions + number) for image in range(images) for number in range(questions)]
    before = model.pruning, model.visual_cache
    rows: list[dict[str, Any]] = []
    try:
        for name, config in {UNPRUNED: None, **configs}.items():
            model.set_pruning(config)
            plain: list[int] = []
            for setting in settings:
                model.visual_cache = None
                _ask(model, pairs[: setting.batch])  # warms up
                model.visual_cache = VisualCache(cache_bytes) if setting.cached else None
                asked = pairs if setting.batch > 1 or not images_one_by_one else pairs[: images_one_by_one * questions]
                answers, seconds = _run(model, asked, setting, f"{name}, batch {setting.batch}")
                plain = plain or answers
                cache = model.visual_cache
                speed = len(asked) / seconds
                row = {
                    "method": name,
                    "batch": setting.batch,
                    "cached": setting.cached,
                    "seconds": seconds,
                    "samples": len(asked),
                    "samples_per_second": speed,
                    "hits": cache.hits if cache else 0,
                    "misses": cache.misses if cache else len(asked),
                    "same_answers": sum(map(lambda a, b: a == b, answers, plain)) / len(plain),
                }
                rows.append(row)
                own = next(other for other in rows if other["method"] == name)
                row["times_plain"] = speed / own["samples_per_second"]
                row["times_unpruned"] = speed / rows[0]["samples_per_second"]
    finally:
        model.set_pruning(before[0])
        model.visual_cache = before[1]
    return rows


def _run(model, pairs: Sequence[tuple[int, int]], setting: Setting, label: str) -> tuple[list, float]:
    """All answers, and the seconds that they took."""
    device = model.get_input_embeddings().weight.device
    answers: list = []
    synchronize(device)
    begin = time.perf_counter()
    with tqdm(total=len(pairs), desc=label, unit=" samples", leave=False) as bar:
        for start in range(0, len(pairs), setting.batch):
            batch = pairs[start : start + setting.batch]
            answers += _ask(model, batch)
            bar.update(len(batch))
    synchronize(device)
    return answers, time.perf_counter() - begin


@torch.inference_mode()
def _ask(model, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    asked = prompts(model, [image for image, _ in pairs], [question for _, question in pairs])
    return model.generate(
        **asked.arguments(), do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0
    ).tolist()
