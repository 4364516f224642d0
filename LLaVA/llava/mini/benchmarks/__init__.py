"""The rows of the eleven embedded benchmarks, in the columns and types of the real data sets.

Every builder returns the tables of one benchmark. Pictures come from the benchmark's own split of the world, answers
are balanced, and rows are in a fixed random order, so that the first few are a fair sample.
"""

from __future__ import annotations

from collections.abc import Callable

from llava.mini.benchmarks.captions import coco2017_cap_val, flickr30k_test, nocaps_val
from llava.mini.benchmarks.choices import mmbench_en_dev, scienceqa_img, seedbench
from llava.mini.benchmarks.mmmu import mmmu_val
from llava.mini.benchmarks.short_answers import gqa, ok_vqa_val2014
from llava.mini.benchmarks.table import Table
from llava.mini.benchmarks.yes_no import mme, pope

__all__ = ["BUILDERS", "Table"]

BUILDERS: dict[str, Callable[[], list[Table]]] = {
    "coco2017_cap_val": coco2017_cap_val,
    "flickr30k_test": flickr30k_test,
    "nocaps_val": nocaps_val,
    "gqa": gqa,
    "mmbench_en_dev": mmbench_en_dev,
    "mme": mme,
    "mmmu_val": mmmu_val,
    "ok_vqa_val2014": ok_vqa_val2014,
    "pope": pope,
    "scienceqa_img": scienceqa_img,
    "seedbench": seedbench,
}
"""Builtin task name -> function that makes its tables."""
