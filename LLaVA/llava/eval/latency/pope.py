"""A synthetic run like POPE: many questions about each image, with short answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from llava.eval.latency.clock import synchronize
from llava.eval.latency.models import UNPRUNED, is_llava, prompts, set_pruning
from llava.eval.latency.report import add_ratios, settings_of
from llava.model.visual_cache import VisualCache
from llava.pruning import PruningConfig

NEW_TOKENS = 2
"""Tokens of "Yes" and the end of the answer."""


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
    """Answer ``questions`` about each of ``images`` random images, with every batch size, with and without a cache.

    Models of transformers have no cache. Batch 1 without a cache, to which all is compared, runs in any case, and so
    does unpruned. ``cache_bytes`` limits the cache. ``images_one_by_one`` limits the images that the runs of batch 1
    ask about, whose samples per second do not depend on it.

    Returns
    -------
    list of dict
        One per method and setting: "method", "batch", "cached", "seconds", "samples", "samples_per_second", "hits",
        "misses"; "times_plain" and "times_unpruned" (see `llava.eval.latency.report.add_ratios`); and "same_answers",
        the share of answers that equal those of the method's first run.
    """
    pairs = [(image, image * questions + number) for image in range(images) for number in range(questions)]
    before = (model.pruning, model.visual_cache) if is_llava(model) else (None, None)
    rows: list[dict[str, Any]] = []
    try:
        for name, config in {UNPRUNED: None, **configs}.items():
            set_pruning(model, config)
            plain: list[int] = []
            for batch, cached in settings_of(batches, is_llava(model)):
                cache = VisualCache(cache_bytes) if cached else None
                _remember(model, None)
                _ask(model, pairs[:batch])  # warms up
                _remember(model, cache)
                asked = pairs if batch > 1 or not images_one_by_one else pairs[: images_one_by_one * questions]
                answers, seconds = _run(model, asked, batch, f"{name}, batch {batch}")
                plain = plain or answers
                row = {"method": name, "batch": batch, "cached": cached, "seconds": seconds, "samples": len(asked)}
                row |= {"samples_per_second": len(asked) / seconds}
                row |= {"hits": cache.hits if cache else 0, "misses": cache.misses if cache else len(asked)}
                rows.append(row | {"same_answers": sum(map(list.__eq__, answers, plain)) / len(plain)})
    finally:
        set_pruning(model, before[0])
        _remember(model, before[1])
    return add_ratios(rows)


def _remember(model, cache: VisualCache | None) -> None:
    """Encode images through a cache, which models of transformers have none of."""
    if is_llava(model):
        model.visual_cache = cache


def _run(model, pairs: Sequence[tuple[int, int]], batch: int, label: str) -> tuple[list[list[int]], float]:
    """All answers, and the seconds that they took."""
    device = model.get_input_embeddings().weight.device
    answers: list[list[int]] = []
    synchronize(device)
    begin = time.perf_counter()
    with tqdm(total=len(pairs), desc=label, unit=" samples", leave=False) as bar:
        for start in range(0, len(pairs), batch):
            answers += _ask(model, pairs[start : start + batch])
            bar.update(len(answers) - start)
    synchronize(device)
    return answers, time.perf_counter() - begin


@torch.inference_mode()
def _ask(model, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    asked = prompts(model, [image for image, _ in pairs], [question for _, question in pairs])
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(**asked, **length, do_sample=False, pad_token_id=0)[:, -NEW_TOKENS:].tolist()
