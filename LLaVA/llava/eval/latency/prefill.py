"""``prefill`` and ``generate``: vision, selection, prefill and decoding of a model, by method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import StoppingCriteria

from llava.eval.latency.clock import TOTAL, Stopwatch, peak_memory, ratio, summarise, take_turns
from llava.eval.latency.models import UNPRUNED, is_llava, prompts, set_pruning, tokens_per_layer
from llava.model.image_tokens import encode
from llava.pruning import PruningConfig
from llava.pruning.base import Pruner
from llava.pruning.own_budget import count_of
from llava.pruning.reduce import reduce
from llava.pruning.rows import cache_of

VISION, SELECTION, PREFILL, TTFT, DECODING = "vision", "selection", "prefill", "ttft", "decoding"


def measure(
    model: torch.nn.Module,
    configs: Mapping[str, PruningConfig],
    *,
    batch: int,
    new_tokens: int,
    repetitions: int,
) -> list[dict[str, Any]]:
    """Time a batch of prompts with an image each, up to the first token or up to the last.

    ``new_tokens`` = 1 is one ``forward``, more are ``generate``; unpruned runs in the same rounds.

    Returns
    -------
    list of dict
        One per method, `UNPRUNED` first: "ms" by part, median and worst (vision is tower and projector, ttft the time
        to the first token, prefill the rest of it without vision and selection); "ttft_ratio" and "total_ratio" to
        unpruned; "selection_share" of selection and prefill; "visual_tokens" per image in the mean over the layers;
        "kv_bytes" after the prefill, "peak_bytes" (None on a CPU), "samples_per_second".
    """
    device = model.get_input_embeddings().weight.device
    asked = prompts(model, range(batch), range(batch))
    variants: dict[str, PruningConfig | None] = {UNPRUNED: None, **configs}
    own = model.pruning if is_llava(model) else None
    try:
        run = _generate(model, asked, new_tokens) if new_tokens > 1 else _forward(model, asked)
        times = take_turns(
            dict.fromkeys(variants, run),
            repetitions,
            device,
            label=f"batch {batch}",
            before=lambda name: set_pruning(model, variants[name]),
        )
        with torch.inference_mode():
            return [_row(model, name, config, asked, new_tokens, times, run) for name, config in variants.items()]
    finally:
        set_pruning(model, own)


def _row(model, name, config, asked, new_tokens, times, run) -> dict[str, Any]:
    device = model.get_input_embeddings().weight.device
    batch = len(asked["input_ids"])
    set_pruning(model, config)
    with peak_memory(device) as memory:
        run(Stopwatch(device))
    kept = [sum(layers) / len(layers) for layers in tokens_per_layer(model, asked)]
    ms = summarise([_split(measured) for measured in times[name]])
    selection, rest = ms[SELECTION]["median"], ms[PREFILL]["median"]
    return {
        "method": name,
        "pruning": config and config.to_dict(),
        "batch": batch,
        "new_tokens": new_tokens,
        "ms": ms,
        "ttft_ratio": ratio(times[UNPRUNED], times[name], TTFT),
        "total_ratio": ratio(times[UNPRUNED], times[name]),
        "selection_share": selection / (selection + rest),
        "visual_tokens": sum(kept) / len(kept),
        "kv_bytes": kv_bytes(cache_of(model(**asked, use_cache=True, logits_to_keep=1))),
        "peak_bytes": memory["bytes"],
        "samples_per_second": 1e3 * batch / ms[TOTAL]["median"],
    }


def _split(measured: Mapping[str, float]) -> dict[str, float]:
    """With the decoder's prefill, without vision and selection."""
    parts = {VISION: 0.0, SELECTION: 0.0} | dict(measured)
    return parts | {PREFILL: parts[TTFT] - parts[VISION] - parts[SELECTION]}


def kv_bytes(cache) -> int:
    """Bytes of the keys and values of all layers; linear attention has none."""
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def _forward(model, asked: Mapping[str, Any]) -> Callable[[Stopwatch], None]:
    def run(watch: Stopwatch) -> None:
        with watch.part(TTFT), parts_of(watch, model):
            model(**asked, use_cache=True, logits_to_keep=1)

    return run


def _generate(model, asked: Mapping[str, Any], new_tokens: int) -> Callable[[Stopwatch], None]:
    def run(watch: Stopwatch) -> None:
        first = _FirstToken(watch)
        begin = watch.now()
        with parts_of(watch, model):
            model.generate(
                **asked,
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                stopping_criteria=[first],
                pad_token_id=0,
            )
        watch.add(TTFT, begin, first.moment)
        watch.add(DECODING, first.moment, watch.now())

    return run


class _FirstToken(StoppingCriteria):
    """Records the time of the first token, and stops nothing."""

    def __init__(self, watch: Stopwatch):
        self._watch, self.moment = watch, None

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        if self.moment is None:
            self.moment = self._watch.now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def parts_of(watch: Stopwatch, model: torch.nn.Module) -> Iterator[None]:
    """Count, inside the block, what the vision tower with its projector and what the selection take."""

    def timed(part: str, function: Callable) -> Callable:
        @functools.wraps(function)  # generate reads the signature
        def call(*arguments, **options):
            with watch.part(part):
                return function(*arguments, **options)

        return call

    if is_llava(model):
        encoding = patch("llava.model.image_tokens.encode", timed(VISION, encode))
    else:
        features = model.base_model.get_image_features
        encoding = patch.object(model.base_model, "get_image_features", timed(VISION, features))
    with (
        encoding,
        patch("llava.pruning.reduce.count_of", timed(SELECTION, count_of)),
        patch("llava.pruning.reduce.reduce", timed(SELECTION, reduce)),  # before the decoder
        patch.object(Pruner, "reduce", timed(SELECTION, Pruner.reduce)),  # inside
    ):
        yield
