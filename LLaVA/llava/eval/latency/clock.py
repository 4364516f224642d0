"""Times the parts of a call, on a device that computes asynchronously."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

TOTAL = "total"


class Stopwatch:
    """Adds up the time of a call's parts.

    On a GPU by events in its stream, for which only `milliseconds` waits, so that measuring parts does not slow the
    whole.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._spans: dict[str, list[tuple]] = defaultdict(list)

    def now(self):
        """A moment, for `add`."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(self, part: str, begin, end) -> None:
        """Count the time between two moments to a part."""
        self._spans[part].append((begin, end))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block to a part."""
        begin = self.now()
        yield
        self.add(name, begin, self.now())

    def milliseconds(self) -> dict[str, float]:
        """Part -> time; waits for the device."""
        synchronize(self._device)
        return {name: sum(self._length(*span) for span in spans) for name, spans in self._spans.items()}

    def _length(self, begin, end) -> float:
        return begin.elapsed_time(end) if self._device.type == "cuda" else 1e3 * (end - begin)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    variants: Mapping[str, Callable[[Stopwatch], None]],
    repetitions: int,
    device: torch.device,
    warm_up: int = 2,
    label: str = "",
    before: Callable[[str], None] | None = None,
) -> dict[str, list[dict[str, float]]]:
    """Run variants in turns, so that the machine's other load affects all of them alike.

    Parameters
    ----------
    variants : mapping
        Name -> what to run; it times its parts on the stopwatch.
    repetitions, warm_up : int
        Measured rounds, and rounds before them.
    device : torch.device
    label : str
        Of the progress bar.
    before : callable, optional
        Called with a variant's name before each of its runs; not measured.

    Returns
    -------
    dict
        Name -> milliseconds by part, `TOTAL` included, of every round.
    """
    times: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with torch.inference_mode(), tqdm(total=len(variants) * (warm_up + repetitions), desc=label, leave=False) as bar:
        for round_ in range(-warm_up, repetitions):
            for name, run in variants.items():
                if before is not None:
                    before(name)
                watch = Stopwatch(device)
                synchronize(device)
                with watch.part(TOTAL):
                    run(watch)
                measured = watch.milliseconds()
                if round_ >= 0:
                    times[name].append(measured)
                bar.update()
    return times


def summarise(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Part -> "median", "p95" and "worst" over the rounds; a part that a round lacks took nothing there."""
    parts = dict.fromkeys(name for measured in rounds for name in measured)
    values = {name: [measured.get(name, 0.0) for measured in rounds] for name in parts}
    return {
        name: {"median": statistics.median(times), "p95": float(np.percentile(times, 95)), "worst": max(times)}
        for name, times in values.items()
    }


def ratio(reference: Sequence[Mapping[str, float]], rounds: Sequence[Mapping[str, float]], part: str = TOTAL) -> float:
    """How many times the reference's time the variant's is: the median over the rounds."""
    return statistics.median(own[part] / other[part] for other, own in zip(reference, rounds, strict=True))


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int | None]]:
    """Yields a dictionary with, after the block, the device's peak memory in "bytes"; None on a CPU."""
    measured: dict[str, int | None] = {"bytes": None}
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    yield measured
    if device.type == "cuda":
        synchronize(device)
        measured["bytes"] = torch.cuda.max_memory_allocated(device)
