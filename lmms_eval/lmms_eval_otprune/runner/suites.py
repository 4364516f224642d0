"""The benchmarks that a run may consist of. Imports nothing beyond the standard library."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from llava.benchmarks import BENCHMARKS, DOCUMENTS, PAPER, benchmark_of

_TASK = re.compile(r"""^task:\s*["']?([\w.-]+)["']?\s*$""", re.MULTILINE)


@dataclass(frozen=True)
class Suite:
    """A set of benchmarks and what is evaluated on it by default.

    Attributes
    ----------
    name : str
    tasks : tuple of str
        Names that lmms-eval knows, in the order of the table.
    models : tuple of str
    methods : tuple of str
        Those that prune, beside the unpruned model.
    embedded : str, or None
        The group of embedded data sets that it consists of.
    """

    name: str
    tasks: tuple[str, ...]
    models: tuple[str, ...]
    methods: tuple[str, ...]
    embedded: str | None = None

    def task(self, name: str) -> str:
        """The suite's task of a benchmark, by any name that lmms-eval has for it; another task is itself."""
        benchmark = benchmark_of(name)
        if name not in self.tasks and benchmark is not None and name != benchmark.mini:
            name = next((task for task in benchmark.tasks if task in self.tasks), name)
        return name


def _embedded(name: str, group: str, model: str, methods: tuple[str, ...]) -> Suite:
    tasks = tuple(benchmark.mini for benchmark in BENCHMARKS if benchmark.mini and benchmark.group == group)
    return Suite(name, tasks, (model,), methods, group)


MINI = _embedded("mini", PAPER, "llava-mini", ("otprune", "random", "divprune"))
READING = _embedded(DOCUMENTS, DOCUMENTS, "llava-mini-reader", ("otprune", "random", "divprune", "downsample"))
PUBLISHED = Suite(
    PAPER,
    tuple(benchmark.task for benchmark in BENCHMARKS if benchmark.group == PAPER),
    ("liuhaotian/llava-v1.5-7b", "liuhaotian/llava-v1.6-vicuna-7b", "liuhaotian/llava-v1.5-13b"),
    ("otprune",),
)
SUITES = {suite.name: suite for suite in (MINI, PUBLISHED, READING)}
"""The embedded benchmarks, those of the paper, and embedded ones that have to be read."""

GROUPS = {
    f"otprune_{group}": tuple(benchmark.task for benchmark in BENCHMARKS if benchmark.group == group)
    for group in dict.fromkeys(benchmark.group for benchmark in BENCHMARKS)
}
"""Names that stand for several published benchmarks."""


def expanded(names: Iterable[str]) -> tuple[str, ...]:
    """Tasks, those of a group in its place."""
    return tuple(task for name in names for task in GROUPS.get(name, (name,)))


def check_tasks(names: Iterable[str]) -> None:
    """Refuse what no suite and no lmms-eval has; where that is not installed yet, nothing is refused.

    Raises
    ------
    ValueError
        Names the nearest.
    """
    own = {name for benchmark in BENCHMARKS for name in benchmark.tasks} | GROUPS.keys()
    if unknown := [name for name in names if name not in own]:
        known = own | builtin_tasks()
        for name in unknown if known > own else ():
            if name not in known:
                near = get_close_matches(name, sorted(known), 4, 0.4) or sorted(own)
                raise ValueError(f"--tasks: lmms-eval has no task {name!r}; the nearest: {', '.join(near)}")


@cache
def builtin_tasks() -> frozenset[str]:
    """The names of lmms-eval's own tasks, read from their definitions: importing it takes seconds."""
    package = find_spec("lmms_eval")
    folders = package.submodule_search_locations if package else ()
    files = (file for folder in folders or () for file in Path(folder, "tasks").rglob("*.yaml"))
    return frozenset(name for file in files for name in _TASK.findall(file.read_text(encoding="utf-8")))
