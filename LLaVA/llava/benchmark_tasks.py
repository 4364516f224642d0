"""lmms-eval's tasks by name, embedded and published ones; lmms-eval must be installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.benchmarks import Benchmark, benchmark_of

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

PLUGIN = "lmms_eval_otprune"
"""Package whose folder ``tasks`` defines the embedded tasks."""

PUBLISHED_GROUPS = ("otprune_paper.yaml", "otprune_documents.yaml")


def load_tasks(name: str) -> dict[str, Any]:
    """A task, or those of a group, with their documents, by task name.

    It is an `ImportError` if lmms-eval is not installed, a `ValueError` if it does not know the name, and an `OSError`
    if a task's data are neither cached nor can be downloaded.
    """
    from lmms_eval.tasks import TaskManager, get_task_dict
    from loguru import logger
    from tenacity import RetryError

    logger.disable("lmms_eval")
    try:
        manager = task_manager([name] if benchmark_of(name) else ())
        if name not in manager.all_tasks:
            manager = TaskManager(include_path=task_folders(), model_name="llava")
        if name not in manager.all_tasks:
            raise ValueError(f"{name} is no task that lmms-eval knows")
        return dict(_flat(get_task_dict([published_entry(name) or name], manager)))
    except RetryError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise OSError(f"the data of the task {name} cannot be had: {reason}") from None
    finally:
        logger.enable("lmms_eval")


def task_manager(tasks: Iterable[str], model: str = "llava", kind: str = "simple") -> TaskManager:
    """An index of the folders that define some tasks; indexing all of lmms-eval takes four seconds.

    Parameters
    ----------
    tasks : iterable of str
        If one is not among `BENCHMARKS`, everything is indexed.
    model : str
        lmms-eval's id: a task's settings may depend on it.
    kind : str
        "chat" for a model that takes messages, which lmms-eval ignores where a task is changed.
    """
    from lmms_eval.tasks import TaskManager

    class OfOneKind(TaskManager):
        def load_config(self, config: dict[str, Any]) -> Mapping[str, Any]:
            return self._load_individual_task_or_group(config, task_type=kind)

    benchmarks = [benchmark_of(task) for task in tasks]
    found = {benchmark for benchmark in benchmarks if benchmark is not None}
    builtin = sorted(str(definition_file(benchmark).parent) for benchmark in found)
    folders = [*task_folders(), *builtin]
    return OfOneKind(include_defaults=None in benchmarks, include_path=folders, model_name=model)


def task_folders() -> list[str]:
    """The folders of the plug-in's tasks, besides lmms-eval's own; none without the plug-in."""
    plugin = find_spec(PLUGIN)
    return [str(Path(folder, "tasks")) for folder in (plugin and plugin.submodule_search_locations) or ()]


def task_entry(name: str, all_metrics: bool) -> dict[str, Any]:
    """A task's entry for lmms-eval, with our changes of its definition.

    Only the table's metric of captions is computed, unless ``all_metrics``: each of the others starts Java again, and
    METEOR alone takes as long as a small task's answers.
    """
    entry = published_entry(name) or {"task": name}
    benchmark = benchmark_of(name)
    if benchmark is not None and benchmark.captions and not all_metrics:
        metrics = definition(benchmark)["metric_list"]
        entry["metric_list"] = [metric for metric in metrics if metric["metric"] == benchmark.metric]
    return entry


def published_entry(name: str) -> dict[str, Any] | None:
    """A published benchmark with our changes, without the login for its data; None for another task."""
    benchmark = benchmark_of(name)
    if benchmark is None or name not in (benchmark.name, benchmark.task):
        return None
    data = {name: value for name, value in _data_arguments(benchmark).items() if name != "token"}
    return {"task": name, "dataset_kwargs": data or None, **changes(benchmark)}


def data_revision(task: str) -> str:
    """``@`` and the data set's revision in lmms-eval's definition of a published task; mostly empty."""
    benchmark = benchmark_of(task)
    revision = None if benchmark is None or task == benchmark.mini else _data_arguments(benchmark).get("revision")
    return f"@{revision}" if revision else ""


def _data_arguments(benchmark: Benchmark) -> dict[str, Any]:
    return definition(benchmark, mode="simple").get("dataset_kwargs") or {}


def changes(benchmark: Benchmark) -> dict[str, Any]:
    """What our group of published benchmarks changes in a definition, besides the source of its data."""
    return {
        name: value
        for entry in _published_groups()
        if entry["task"] == benchmark.task
        for name, value in entry.items()
        if name not in ("task", "dataset_kwargs")
    }


@cache
def _published_groups() -> list[dict[str, Any]]:
    from lmms_eval.utils import load_yaml_config

    paths = [Path(folder, group) for folder in task_folders() for group in PUBLISHED_GROUPS]
    return [entry for path in paths for entry in load_yaml_config(yaml_path=str(path), mode="full")["task"]]


def definition(benchmark: Benchmark, mode: str = "full") -> dict[str, Any]:
    """lmms-eval's definition of a benchmark, with its functions imported unless ``mode`` is "simple"."""
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(yaml_path=str(definition_file(benchmark)), mode=mode)


def definition_file(benchmark: Benchmark) -> Path:
    """The file of that definition."""
    import lmms_eval.tasks

    return Path(lmms_eval.tasks.__file__).parent / benchmark.folder / f"{benchmark.task}.yaml"


def _flat(tasks: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in tasks.items():
        if isinstance(task, dict):
            yield from _flat(task)
        else:
            yield str(name), task
