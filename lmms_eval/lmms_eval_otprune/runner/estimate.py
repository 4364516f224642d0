"""Estimates how long the embedded suite will take on this machine's CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch

from llava.flops import USUAL_TEXT, exact_flops, load_shape, tokens_per_layer, visual_per_layer
from llava.mini.suite import TASKS, rows_of
from lmms_eval_otprune.models.java import needs_java

from .plan import Job, Plan

# Measured with llava-mini on two cores of an AMD EPYC, whose matrix products ran at REFERENCE.
REFERENCE = 88e9
"""FLOPs a second."""
SHARE = 0.82
"""Speed of a whole prefill as a fraction of that of a matrix product."""
QUESTION, CAPTION, AGAIN = 0.008, 0.016, 0.004
"""Seconds per question besides its prefill, additional ones per caption, and fewer where an earlier row prepared the
question, at the reference speed."""
START, REPORT, ROW = 15.0, 7.0, 4.4
"""Seconds to load libraries and model, and to write the report and each of its rows, at the reference speed."""


def estimate(units: Sequence[tuple[Job, str]], plan: Plan, limit: int | None, report: bool) -> float | None:
    """Seconds for the given tasks; None if they cannot be estimated.

    Parameters
    ----------
    units : sequence of (Job, task)
    plan : Plan
    limit : int or None
        Documents a task.
    report : bool
        Whether one is made at the end.
    """
    if not set(plan.tasks) <= TASKS.keys() or plan.device != "cpu" or not units:
        return None
    speed = _speed()
    encoded: set[tuple[str, bool, str]] = set()
    jobs = dict.fromkeys(job for job, _ in units)
    seconds = (START + (REPORT + ROW * len(jobs)) * report) * REFERENCE / speed
    try:
        prefills = {job: _prefill(job) for job in jobs}
        for job, task in units:
            questions = min(rows_of(task), limit or rows_of(task))
            images = (job.model, job.grey, task)
            again = bool(plan.visual_cache) and images in encoded
            # Few questions of this suite share an image, but all grey images are the same.
            flops = prefills[job] if again or job.grey else prefills[job] + _encoding(job)
            encoded.add(images)
            beside = (QUESTION + CAPTION * needs_java(task) - AGAIN * again) * REFERENCE
            seconds += questions * (flops / SHARE + beside) / speed / plan.num_processes
    except (OSError, ValueError):  # the checkpoint is not here, or its cost cannot be counted
        return None
    return seconds


def in_words(seconds: float) -> str:
    """Rounded to minutes or hours."""
    minutes = max(1, round(seconds / 60))
    return f"about {minutes} min" if minutes < 90 else f"about {seconds / 3600:.1f} h"


def _prefill(job: Job) -> int:
    """FLOPs of a question, without the vision tower's."""
    shape = load_shape(job.model)
    layers = shape.decoder.layers
    # The beginnings of prompts with grey images are computed once.
    visual = ([0 if job.grey else shape.visual_tokens] * layers,) * 2
    if job.pruning is not None:
        try:
            visual = visual_per_layer(job.pruning, shape.visual_tokens, layers)
        except ValueError:  # the model or the image decides: about the ratio, in the mean over the layers
            visual = ([round(shape.visual_tokens * (job.pruning.ratio or 1))] * layers,) * 2
    tokens, after = (tokens_per_layer(USUAL_TEXT, column) for column in visual)
    return exact_flops(shape, tokens, after=after, crops=0).total


def _encoding(job: Job) -> int:
    """FLOPs of an image's way to the decoder."""
    shape = load_shape(job.model)
    nothing = [0] * shape.decoder.layers
    return exact_flops(shape, nothing).total - exact_flops(shape, nothing, crops=0).total


def _speed() -> float:
    """FLOPs a second of one core's matrix products, in a third of a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.ones(2520, 192), torch.ones(192, 640)
        spent: list[float] = []
        end = time.perf_counter() + 0.3
        while (begin := time.perf_counter()) < end:
            a @ b
            spent.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    # The median: the first products are slow, and others use the machine now and then.
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / median(spent)
