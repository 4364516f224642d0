"""``suite``: the embedded suite through lmms-eval, samples a second with and without pruning, batches and the cache."""

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

from llava.benchmark_tasks import task_folders
from llava.eval.latency.methods import UNPRUNED, read_methods
from llava.eval.latency.report import add_ratios
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

    Every run is a process of its own. What it takes is lmms-eval's own measurement of the answering: loading the model
    and scoring are left out, reading and preparing images is not.

    Parameters
    ----------
    pretrained : str
    methods : sequence of str
        See `llava.eval.latency.methods.read_methods`.
    ratio : float
        Kept ratio.
    batches : sequence of int
    tasks : sequence of str
    limit : int or None
        Samples per task.
    device : str
    folder : Path
        Gets a folder per run with lmms-eval's results.

    Returns
    -------
    list of dict
        One per method, batch size and use of the cache: "method", "batch", "cached", "samples_per_second", "hits",
        "misses", "times_plain" and "times_unpruned" (see `llava.eval.latency.report.add_ratios`).

    Raises
    ------
    ImportError
        If lmms-eval is not installed.
    OSError
        If a run fails.
    """
    configs = read_methods([method for method in methods if method != UNPRUNED], ratio)
    for package in ("lmms_eval", "lmms_eval_otprune"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"suite runs the embedded benchmarks through {package}, which is not installed")
    settings = dict.fromkeys((batch, cached) for batch in (1, *batches) for cached in (False, True))
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
    kept = {
        name: value for name, value in os.environ.items() if name not in ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX")
    }
    forget_place(kept)
    return kept | switch


def run_tasks(
    model_args: str, tasks: Sequence[str], batch: int, limit: int | None, folder: Path, switch: dict[str, str]
) -> dict[str, Any]:
    """One run in a process of its own: its "samples_per_second", "hits" and "misses"; an `OSError` if it fails.

    ``model_args`` are our lmms-eval model's, ``switch`` is `BASELINE` and what belongs to it; ``folder`` gets
    lmms-eval's results.
    """
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava", "--model_args", model_args]
    # lmms-eval looks for tasks in its own folder and in those that it is told.
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
