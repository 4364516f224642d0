"""How long the embedded suite will take on this machine's CPU, said before it begins."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from statistics import median

import torch

from llava.flops import USUAL_TEXT, exact_flops, load_shape, tokens_per_layer, visual_per_layer
from llava.mini.suite import rows_of
from lmms_eval_otprune.models.java import needs_java

from .plan import Job, Plan

# Measured with llava-mini on two cores of an AMD EPYC, whose matrix products ran at REFERENCE.
REFERENCE = 88e9
"""FLOPs a second."""
SHARE = 0.82
"""Of a matrix product's speed, what a whole prefill reaches."""
QUESTION, CAPTION = 0.008, 0.016
"""Seconds to read, prepare and answer a question beside its prefill, and more for a caption, at the reference."""
START, REPORT = 15.0, 30.0
"""Seconds to load libraries and model, and for the report, at the reference."""


def estimate(units: Sequence[tuple[Job, str]], plan: Plan, limit: int | None, report: bool) -> float | None:
    """Seconds for tasks that have no result yet; None where they cannot be known.

    Parameters
    ----------
    units : sequence of (Job, task)
    plan : Plan
    limit : int or None
        Documents a task.
    report : bool
        Whether one is made at the end.
    """
    if plan.suite.name != "mini" or plan.device != "cpu" or not units:
        return None
    speed = _speed()
    try:
        seconds = sum(
            _row(job, [task for one, task in units if one is job], limit, speed)
            for job in {id(job): job for job, _ in units}.values()
        )
        seconds += _encoding(units, plan, limit, speed)
    except (OSError, ValueError):  # the checkpoint is not here, or its cost cannot be counted
        return None
    return seconds / plan.num_processes + (START + REPORT * report) * REFERENCE / speed


def in_words(seconds: float) -> str:
    """As a person would say it."""
    minutes = max(1, round(seconds / 60))
    return f"about {minutes} min" if minutes < 90 else f"about {seconds / 3600:.1f} h"


def _questions(task: str, limit: int | None) -> int:
    return rows_of(task) if limit is None else min(limit, rows_of(task))


def _row(job: Job, tasks: Sequence[str], limit: int | None, speed: float) -> float:
    shape = load_shape(job.model)
    layers = shape.decoder.layers
    visual = ([shape.visual_tokens] * layers,) * 2
    if job.pruning is not None:
        try:
            visual = visual_per_layer(job.pruning, shape.visual_tokens, layers)
        except ValueError:  # the model or the image decides: about the ratio, in the mean over the layers
            visual = ([round(shape.visual_tokens * (job.pruning.ratio or 1))] * layers,) * 2
    tokens, after = (tokens_per_layer(USUAL_TEXT, column) for column in visual)
    prefill = exact_flops(shape, tokens, after=after, crops=0).total / (SHARE * speed)
    beside = {task: (QUESTION + CAPTION * needs_java(task)) * REFERENCE / speed for task in tasks}
    return sum(_questions(task, limit) * (prefill + beside[task]) for task in tasks)


def _encoding(units: Sequence[tuple[Job, str]], plan: Plan, limit: int | None, speed: float) -> float:
    """Of every image once, or in every row; few questions of this suite share an image."""
    times = Counter((job.model, job.grey, task) for job, task in units)
    seconds = 0.0
    for (model, _, task), rows in times.items():
        shape = load_shape(model)
        nothing = [0] * shape.decoder.layers
        one = exact_flops(shape, nothing, crops=1).total - exact_flops(shape, nothing, crops=0).total
        seconds += _questions(task, limit) * one / (SHARE * speed) * (1 if plan.visual_cache else rows)
    return seconds


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
        # The median: the first ones are slow, and others use the machine now and then.
        return 2 * a.shape[0] * a.shape[1] * b.shape[1] / median(spent)
    finally:
        torch.set_num_threads(threads)
