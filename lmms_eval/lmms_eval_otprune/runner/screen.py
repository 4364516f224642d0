"""What the user sees during a run: a line per finished task, and on a terminal progress bars and the table so far."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llava.benchmarks import benchmark_of
from llava.eval.results.findings import findings
from llava.eval.results.formats import FLOPS, cells
from llava.eval.results.rows import Row
from llava.eval.table import Table as MadeTable

from . import records
from .plan import Job

ALWAYS = ("Method", "Kept tokens", "Mean")
"""Columns for which a narrow terminal has room."""
_UNLIMITED = 10_000
_SLOW = 300.0
"""Seconds over which speed is averaged: tasks differ, and the estimated time left should not jump."""


class Screen:
    """A context manager; inside it, a terminal shows a bar for each task under way, and the table of the rows so far.

    Without a terminal there is only a line per task.

    Parameters
    ----------
    units : int
        Tasks of all rows.
    console : rich.console.Console, optional
        Default: standard output.
    """

    def __init__(self, units: int, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=_SLOW,
        )
        self._whole = self._bars.add_task("tasks", total=units)
        self._under_way: dict[Hashable, TaskID] = {}
        self._rows: Sequence[Row] = ()
        self._live = Live(get_renderable=self._frame, console=self.console, transient=True, refresh_per_second=4)

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def begin(self, worker: Hashable, job: Job, task: str) -> None:
        """A worker has begun a task."""
        self.leave(worker)
        self._under_way[worker] = self._bars.add_task(f"{job.label} {task}", total=None)

    def advance(self, worker: Hashable, done: int, of: int) -> None:
        """How many of a task's samples a worker has done."""
        if worker in self._under_way:
            self._bars.update(self._under_way[worker], completed=done, total=of)

    def leave(self, worker: Hashable) -> None:
        """A worker has no task any more."""
        if worker in self._under_way:
            self._bars.remove_task(self._under_way.pop(worker))

    def end(self, job: Job, task: str) -> None:
        """A task has been tried: print its outcome."""
        self._bars.advance(self._whole)
        failed = records.failure(job.folder, task)
        self.say(f"{job.label} {task}: {f'FAILED, {failed}' if failed else _outcome(job, task)}")

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(Text(text), soft_wrap=True)

    def show(self, rows: Sequence[Row]) -> None:
        """Set the table's rows so far."""
        self._rows = rows

    def finish(self, made: MadeTable) -> None:
        """Print the table, fitted to a terminal or in Markdown, and the findings."""
        self._rows = made.rows
        self.console.print()
        if self.console.is_terminal:
            self.console.print(self.table())
            self.console.print()
        else:
            self.say(made.render("markdown"))
        for sentence in findings(made.rows):
            self.say(sentence)

    def table(self) -> Table:
        """The rows so far, with the columns for which there is room."""
        header, lines = cells(self._rows, intervals=False)
        models = {line[0] for line in lines}
        every = [name for name in header if name != "Rank" and (name != "Model" or len(models) > 1)]
        for shown in (every, [name for name in every if name in (*ALWAYS, "Model")]):
            table = Table(box=None, pad_edge=False)
            for name in shown:
                words = name in ("Model", "Method")
                table.add_column("FLOPs" if name == FLOPS else name, justify="left" if words else "right", no_wrap=True)
            for line in lines:
                table.add_row(*(Text(cell) for name, cell in zip(header, line, strict=True) if name in shown))
            wanted = self.console.measure(table, options=self.console.options.update(max_width=_UNLIMITED)).maximum
            if wanted <= self.console.width:
                break
        return table

    def _frame(self) -> Group:
        above: list[RenderableType] = [self.table(), ""] if self._rows else []
        return Group(*above, self._bars)


def _outcome(job: Job, task: str) -> str:
    """A task's score, samples and seconds."""
    result = records.read_json(records.task_folder(job.folder, task) / records.RESULT) or {}
    found = []
    if (benchmark := benchmark_of(task)) and benchmark.metric in result.get("metrics", {}):
        found.append(f"{benchmark.key} {benchmark.scale * result['metrics'][benchmark.metric]:.{benchmark.digits}f}")
    return ", ".join([*found, f"{result.get('samples', 0)} samples in {result.get('seconds', 0):.0f} s"])
