"""The embedded suite's tasks: lmms-eval's builtin definitions over the data sets that `llava.mini.suite` builds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features
from datasets.table import InMemoryTable
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
from lmms_eval.tasks import TaskManager
from pyarrow import parquet

from llava.mini import suite

from . import captions, gqa, mmmu
from .builtin import definition

# MMBench's own definition asks a paid judge about answers that it cannot read.
_DEFINITIONS = {"mmbench_en_dev": "mmbench_en_dev_static"}
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
        self._embedded = suite.TASKS[config["task"]]
        builtin = self._embedded.builtin
        own = definition(_DEFINITIONS.get(builtin, builtin))
        kept = {name: value for name, value in own.items() if name not in _LEFT_OUT}
        super().__init__(config={**kept, **_changes(builtin, kept), **config}, model_name=_asked_for()[1])

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the suite, which is built first where it is missing; nothing comes from the network."""
        data = self._table(self._embedded.config, self._embedded.split)
        self.dataset = DatasetDict({self._embedded.split: data})
        self.dataset_no_image = DatasetDict({self._embedded.split: data.remove_columns(_pictures(data.features))})
        if self._embedded.builtin == "gqa":
            images = self._table("testdev_balanced_images", self._embedded.split)
            self.config.doc_to_visual = gqa.look_up_in(images)

    def _table(self, config: str, split: str) -> Dataset:
        # Not through load_dataset: its cache does not notice a local folder that was written anew.
        return _read(suite.prepare() / self._embedded.folder / config / f"{split}.parquet")


class EmbeddedMessagesTask(EmbeddedTask, ConfigurableMessagesTask):
    """The same for lmms-eval's chat wrappers."""


def _asked_for() -> tuple[str, str]:
    """What lmms-eval loads a task for: "simple" or "chat", and the model's id. It tells a task's class neither."""
    frame = sys._getframe(1)
    while frame is not None:
        manager = frame.f_locals.get("self")
        if isinstance(manager, TaskManager) and "task_type" in frame.f_locals:
            return frame.f_locals["task_type"], manager.model_name or "llava"
        frame = frame.f_back
    return "simple", "llava"


def _changes(builtin: str, own: dict[str, Any]) -> dict[str, Any]:
    """What the embedded task does in another way than the builtin one, as in ``otprune_paper.yaml``."""
    if builtin == "gqa":
        return {"process_docs": None}
    if builtin == "mmbench_en_dev":
        return {"metric_list": [metric for metric in own["metric_list"] if metric["metric"] != "submission"]}
    scored = {**captions.PROCESS_RESULTS, "mmmu_val": mmmu.process_results}
    return {"process_results": scored[builtin]} if builtin in scored else {}


def _read(path: Path) -> Dataset:
    return Dataset(InMemoryTable(parquet.read_table(path)))


def _pictures(features: Features) -> list[str]:
    """Columns that hold pictures, alone or in lists."""
    return [name for name, feature in features.items() if "Image(" in repr(feature)]
