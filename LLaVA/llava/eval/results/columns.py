"""The eleven columns of the papers' table: which benchmark, which metric, on which scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """A benchmark and the metric that the papers print of it.

    Attributes
    ----------
    key : str
        Short name, as in the papers.
    tasks : tuple of str
        lmms-eval's names for it, embedded counterparts included.
    metric : str
    scale : float
        What the framework's value is multiplied with to be read like the papers' (percent, CIDEr, MME's points).
    digits : int
        Decimals shown.
    """

    key: str
    tasks: tuple[str, ...]
    metric: str
    scale: float = 100.0
    digits: int = 2

    def task_in(self, tasks: Mapping[str, Any]) -> str | None:
        """The task among a run's results that this column is read from, or None."""
        values = {task: tasks[task]["metrics"].get(self.metric) for task in self.tasks if task in tasks}
        # lmms-eval gives nan where there was nothing to score.
        found = [task for task, value in values.items() if value is not None and math.isfinite(value)]
        return found[-1] if found else None


def _column(key: str, task: str, metric: str, scale: float = 100.0, digits: int = 2) -> Column:
    return Column(key, (task, f"{task}_static", f"mini_{task}"), metric, scale, digits)


COLUMNS = (
    _column("COCO", "coco2017_cap_val", "coco_CIDEr", 1.0),
    _column("Flickr30k", "flickr30k_test", "flickr_CIDEr", 1.0),
    _column("GQA", "gqa", "exact_match"),
    _column("MMB", "mmbench_en_dev", "gpt_eval_score", 1.0),
    _column("MME-P", "mme", "mme_perception_score", 1.0, 0),
    _column("MMMU", "mmmu_val", "mmmu_acc"),
    _column("NoCaps", "nocaps_val", "nocaps_CIDEr", 1.0),
    _column("OKVQA", "ok_vqa_val2014", "exact_match"),
    _column("POPE", "pope", "pope_f1_score"),
    _column("SQA", "scienceqa_img", "exact_match"),
    _column("SEED-I", "seedbench", "seed_image"),
)
