"""The benchmarks that a run may consist of. Imports nothing beyond the standard library."""

from __future__ import annotations

from dataclasses import dataclass

from llava.benchmarks import BENCHMARKS, PAPER, benchmark_of


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
    """

    name: str
    tasks: tuple[str, ...]
    models: tuple[str, ...]
    methods: tuple[str, ...]

    def task(self, name: str) -> str:
        """The suite's task of a benchmark, by any name that lmms-eval has for it.

        Raises
        ------
        ValueError
            If the suite has no such task.
        """
        benchmark = benchmark_of(name)
        if name not in self.tasks and benchmark is not None and name != benchmark.mini:
            name = next((task for task in benchmark.tasks if task in self.tasks), name)
        if name in self.tasks:
            return name
        raise ValueError(f"the {self.name} suite has no task {name!r}; its tasks: {', '.join(self.tasks)}")


MINI = Suite(
    "mini",
    tuple(benchmark.mini for benchmark in BENCHMARKS if benchmark.mini),
    ("llava-mini",),
    ("otprune", "random", "divprune"),
)
PUBLISHED_MODELS = ("liuhaotian/llava-v1.5-7b", "liuhaotian/llava-v1.6-vicuna-7b", "liuhaotian/llava-v1.5-13b")


def _published(group: str) -> Suite:
    tasks = tuple(benchmark.task for benchmark in BENCHMARKS if benchmark.group == group)
    return Suite(group, tasks, PUBLISHED_MODELS, ("otprune",))


SUITES = {MINI.name: MINI} | {benchmark.group: _published(benchmark.group) for benchmark in BENCHMARKS}
"""The embedded benchmarks, and every group of published ones."""


def suite_with(task: str) -> str:
    """The suite that has a task of this name; the paper's if none has."""
    return next((name for name, suite in SUITES.items() if task in suite.tasks), PAPER)
