"""The embedded suite's tasks: lmms-eval's builtin definitions over the data sets that `llava.mini.suite` builds."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from datasets import Dataset, DatasetDict, Features
from datasets.table import InMemoryTable
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
from lmms_eval.tasks import TaskManager
from pyarrow import parquet

from llava.benchmark_tasks import changes, definition
from llava.mini import suite

from . import gqa

# Where the builtin task finds its data, and what it is filed under there.
_LEFT_OUT = ("dataset_path", "dataset_name", "dataset_kwargs", "group", "tag")


class EmbeddedTask(ConfigurableTask):
    """One benchmark of the embedded suite: prompts, settings, metrics and scoring are the builtin task's.

    Parameters
    ----------
    config : dict
        ``task`` is a name of `llava.mini.suite.TASKS`; what else it holds overrides the builtin definition.
    """

    def __new__(cls, config: dict[str, Any]):
        # The class in a task's definition is one for all models; chat wrappers ask for messages.
        chat = cls is EmbeddedTask and _asked_for()[0] == "chat"
        return super().__new__(EmbeddedMessagesTask if chat else cls)

    def __init__(self, config: dict[str, Any]):
        config = {name: value for name, value in config.items() if name != "class"}
        benchmark = suite.TASKS[config["task"]]
        self._data, self._group = suite.DATA[config["task"]], benchmark.group
        kept = {name: value for name, value in definition(benchmark).items() if name not in _LEFT_OUT}
        super().__init__(config={**kept, **changes(benchmark), **config}, model_name=_asked_for()[1])

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the suite, which is built first where it is missing; nothing comes from the network."""
        split = self._data.split
        data = self._table(self._data.config)
        self.dataset = DatasetDict({split: data})
        self.dataset_no_image = DatasetDict({split: data.remove_columns(_image_columns(data.features))})
        if self._data.image_config:
            self.config.doc_to_visual = gqa.look_up_in(self._table(self._data.image_config))

    def _table(self, config: str) -> Dataset:
        # Not through load_dataset: its cache does not notice a local folder that was written anew.
        path = suite.prepare(group=self._group) / self._data.folder / config / f"{self._data.split}.parquet"
        return Dataset(InMemoryTable(parquet.read_table(path)))


class EmbeddedMessagesTask(EmbeddedTask, ConfigurableMessagesTask):
    """The same for lmms-eval's chat wrappers."""


def _asked_for() -> tuple[str, str]:
    """What lmms-eval loads a task for: "simple" or "chat", and the model's id. It tells a task's class neither."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        manager = frame.f_locals.get("self")
        if isinstance(manager, TaskManager) and "task_type" in frame.f_locals:
            return frame.f_locals["task_type"], manager.model_name or "llava"
        frame = frame.f_back
    return "simple", "llava"


def _image_columns(features: Features) -> list[str]:
    """Columns that hold images, alone or in lists."""
    return [name for name, feature in features.items() if "Image(" in repr(feature)]
