"""``suite``: samples per second of the embedded suite through lmms-eval, by method, batch size and use of the cache."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava import hf
from llava.benchmark_tasks import task_folders
from llava.eval.latency.models import UNPRUNED, read_methods
from llava.eval.latency.report import add_ratios, settings_of
from llava.runtime import forget_place

TASKS = ["mini_pope", "mini_gqa"]


def measure(
    pretrained: str,
    methods: Sequence[str],
    *,
    ratio: float,
    batches: Sequence[int],
    tasks: Sequence[str],
    limit: int | None,
    device: str,
    folder: Path,
) -> list[dict[str, Any]]:
    """Run tasks with every method and batch size, and compare with an unpruned run of batches of 1 without a cache.

    Every run is a process of its own and leaves lmms-eval's results in a folder of its own in ``folder``. The time is
    lmms-eval's own measurement of the answers, which includes reading and preparing images, but not loading the model.

    Returns
    -------
    list of dict
        One per method, batch size and use of the cache: "method", "batch", "cached", "samples_per_second", "hits",
        "misses", "times_plain" and "times_unpruned" (see `llava.eval.latency.report.add_ratios`).

    Raises
    ------
    ImportError
        If lmms-eval is not installed.
    ValueError
        For a model of transformers.
    OSError
        If a run fails.
    """
    if hf.holds(pretrained):
        raise ValueError(
            "suite compares batch sizes and a cache of encoded images, which lmms-eval's wrappers of transformers' "
            f"models do not have: use `run_OTPrune.sh mini --model {pretrained}`"
        )
    configs = read_methods([method for method in methods if method != UNPRUNED], ratio)
    for package in ("lmms_eval", "lmms_eval_otprune"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"suite runs the embedded benchmarks through {package}, which is not installed")
    settings = settings_of(batches)
    rows: list[dict[str, Any]] = []
    names = list(dict.fromkeys([UNPRUNED, *configs]))
    with tqdm(total=len(names) * len(settings), desc="suite", unit=" runs") as bar:
        for method in names:
            switch = {"BASELINE": "ORIG"} if method == UNPRUNED else configs[method].to_env()
            for batch, cached in settings:
                arguments = f"pretrained={pretrained},device={device},visual_cache={2**28 if cached else 'off'}"
                place = folder / f"{method}_batch{batch}_{'cache' if cached else 'no_cache'}"
                found = run_tasks(arguments, tasks, batch, limit, place, switch)
                rows.append({"method": method, "batch": batch, "cached": cached, **found})
                bar.update()
    return add_ratios(rows)


def environ_with(switch: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a process of its own with another switch."""
    own = ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    forget_place(kept)
    return kept | switch


def run_tasks(
    model_args: str, tasks: Sequence[str], batch: int, limit: int | None, folder: Path, switch: dict[str, str]
) -> dict[str, Any]:
    """One run in a process of its own: its "samples_per_second", "hits" and "misses"; an `OSError` if it fails.

    ``switch`` is `BASELINE` with its options.
    """
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava", "--model_args", model_args]
    command += ["--include_path", *task_folders()]
    command += ["--tasks", ",".join(tasks), "--batch_size", str(batch), "--output_path", str(folder)]
    command += [] if limit is None else ["--limit", str(limit)]
    done = subprocess.run(
        command, env=environ_with(switch), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    files = sorted(folder.rglob("*_results.json"))
    if done.returncode or not files:
        last = done.stdout.strip().splitlines()[-1:] or ["nothing was printed"]
        raise OSError(f"{folder.name}: lmms-eval ended with status {done.returncode}: {last[0]}")
    found = json.loads(files[-1].read_text(encoding="utf-8"))["throughput"]
    return {
        "samples_per_second": 1 / found["avg_latency"],
        "hits": found.get("avg_visual_cache_hits", 0),
        "misses": found.get("avg_visual_cache_misses", 0),
    }
