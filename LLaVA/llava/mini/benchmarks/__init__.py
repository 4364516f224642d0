"""The rows of the embedded benchmarks, in the columns and types of the real data sets.

Every builder returns the tables of one benchmark. Images come from the benchmark's own split of the world, answers
are balanced, and rows are in a fixed random order, so that the first few are a fair sample.
"""

from __future__ import annotations

from collections.abc import Callable

from llava.mini.benchmarks.captions import coco2017_cap_val, flickr30k_test, nocaps_val
from llava.mini.benchmarks.choices import mmbench_en_dev, scienceqa_img, seedbench
from llava.mini.benchmarks.documents import chartqa, docvqa_val, ocrbench, textvqa_val
from llava.mini.benchmarks.mmmu import mmmu_val
from llava.mini.benchmarks.short_answers import gqa, ok_vqa_val2014
from llava.mini.benchmarks.table import Table
from llava.mini.benchmarks.yes_no import mme, pope

BUILDERS: dict[str, Callable[[], list[Table]]] = {
    build.__name__: build
    for build in (
        *(coco2017_cap_val, flickr30k_test, nocaps_val, gqa, mmbench_en_dev, mme, mmmu_val, ok_vqa_val2014, pope),
        *(scienceqa_img, seedbench),
        *(textvqa_val, chartqa, docvqa_val, ocrbench),
    )
}
"""Builtin task name -> function that makes its tables."""
