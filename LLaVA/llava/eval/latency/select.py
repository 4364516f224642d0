"""``select``: the time of the selection alone, beside the published algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava.eval.latency.clock import TOTAL, peak_memory, ratio, summarise, take_turns
from llava.eval.latency.models import PUBLISHED, read_methods
from llava.pruning.base import Pruner
from llava.pruning.registry import method_names
from llava.pruning.signals import SIGNALS, content_key
from llava.pruning.tokens import TokenGrid, VisualTokens

METHODS = ["otprune", "divprune", "dpp"]

ALL, REFERENCE = "all", "divprune"
NOTHING_TO_TIME = ("ocvtp", "scorer", "vtw")
"""Not among `ALL`: trained networks take one width of features only, and VTW chooses no tokens."""

CLIP = {"C": 1024, "c": 64, "H": 16}
"""Sizes of CLIP ViT-L, by which signals are made up: width, head width, heads."""
QUESTION = 32
"""Tokens of a made-up question."""


@dataclass(frozen=True)
class Size:
    """N tokens per image, k of them kept, in a batch of images."""

    n: int
    k: int
    batch: int

    @classmethod
    def read(cls, text: str) -> Size:
        """From ``N:K`` or ``N:KxBATCH``; a `ValueError` for anything else."""
        tokens, _, batch = text.partition("x")
        n, _, k = tokens.partition(":")
        if not (text.isascii() and n.isdecimal() and k.isdecimal() and (batch or "1").isdecimal()):
            raise ValueError(f"a size is N:K or N:KxBATCH, such as 576:56x32, not {text!r}")
        size = cls(int(n), int(k), int(batch or 1))
        if not 1 <= size.k <= size.n or size.batch < 1:
            raise ValueError(f"a size needs 1 <= K <= N and at least one image, not {text!r}")
        return size


SIZES = [Size(576, 56, 1), Size(2880, 282, 1), Size(576, 56, 32)]


def curve(sizes: Sequence[Size]) -> dict[str, list[Size]]:
    """Sizes around the first one: of N at the same kept ratio, of k, and of the batch."""
    n, k, batch = sizes[0].n, sizes[0].k, sizes[0].batch
    return {
        "N": [Size(max(1, n * i // 4), max(1, k * i // 4), batch) for i in (1, 2, 4, 8, 16)],
        "k": [Size(n, max(1, min(n, k * i // 4)), batch) for i in (1, 2, 4, 8, 16)],
        "batch": [Size(n, k, batch * i) for i in (1, 2, 4, 8)],
    }


def made_up_signals(pruner: Pruner, features: torch.Tensor) -> dict[str, Any]:
    """Random signals of the shapes that a method gets from a model."""
    draw, (batch, n, width) = torch.Generator().manual_seed(1), features.shape
    found: dict[str, Any] = {}
    for signal in (SIGNALS[need] for need in sorted(pruner.needs - {"image_keys"})):
        sizes = CLIP | {"D": width, "E": len(pruner.encoder_layers)}
        tail = [sizes[axis] for axis in signal.shape.partition(")")[0].split(", ")[1 + signal.per_token :]]
        if not signal.per_token:
            found[signal.name] = tuple(torch.randn(batch, QUESTION, *tail, generator=draw).to(features))
        elif signal.shape.endswith("float32"):
            found[signal.name] = torch.rand(batch, n, *tail, generator=draw).to(features.device)
        else:
            found[signal.name] = torch.randn(batch, n, *tail, generator=draw).to(features)
    return found


def measure(
    sizes: Sequence[Size],
    methods: Sequence[str],
    *,
    width: int,
    repetitions: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Time selections on random tokens of ``width`` numbers, beside the published algorithm in the same rounds.

    Other inputs of a method are made up, and what a model computes for it is not timed. `ALL` among the methods stands
    for every installed one.

    Returns
    -------
    list of dict
        One per size and method: "method", "n", "k", "batch", "ms" (median and worst of all images together),
        "times_published" (how many times faster than the published algorithm), "of_divprune" (its time as a multiple of
        DivPrune's; None where that is not measured) and "peak_bytes" (None on a CPU).
    """
    if ALL in methods:
        methods = [name for name in method_names() if name not in NOTHING_TO_TIME]
    configs = read_methods(list(dict.fromkeys([PUBLISHED, *methods])), ratio=1.0)
    pruners = {name: config.build_pruner() for name, config in configs.items()}
    rows = []
    for size in sizes:
        features = torch.randn(size.batch, size.n, width, generator=torch.Generator().manual_seed(0))
        features = features.to(device=device, dtype=dtype)
        keys = tuple(content_key(image[:1]) for image in features)
        runs = {}
        for name, pruner in pruners.items():
            signals = {"image_keys": keys, **made_up_signals(pruner, features)}
            tokens = VisualTokens(features, size.k, layout=(TokenGrid(1, size.n),), **signals)
            choose = pruner.merge if pruner.merges else pruner.select
            runs[name] = lambda _, choose=choose, tokens=tokens: choose(tokens)
        label = f"{size.n} -> {size.k}, {size.batch} image{'s' * (size.batch > 1)}"
        times = take_turns(runs, repetitions, device, label=label)
        for name, run in runs.items():
            with peak_memory(device) as memory, torch.inference_mode():
                run(None)
            row = {"method": name, "n": size.n, "k": size.k, "batch": size.batch, "ms": summarise(times[name])[TOTAL]}
            row |= {"times_published": ratio(times[name], times[PUBLISHED]), "peak_bytes": memory["bytes"]}
            row["of_divprune"] = ratio(times[REFERENCE], times[name]) if REFERENCE in times else None
            rows.append(row)
    return rows
