"""The table of benchmarks: everything else reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from llava.benchmarks import BENCHMARKS, benchmark_of, columns_of, shown_columns
from llava.eval.results.rows import PUBLISHED_FILE


def test_no_name_is_declared_twice():
    names = Counter(name for benchmark in BENCHMARKS for name in (benchmark.key, *benchmark.tasks))
    assert names.most_common(1)[0][1] == 1


def test_every_published_score_has_a_column():
    published = json.loads(PUBLISHED_FILE.read_text())
    assert {key for row in published for key in row["scores"]} <= {benchmark.key for benchmark in BENCHMARKS}


@pytest.mark.parametrize("task", ["mmbench_en_dev", "mmbench_en_dev_static", "mini_mmbench_en_dev"])
def test_a_benchmark_is_found_by_each_of_its_tasks(task):
    assert benchmark_of(task).key == "MMB"


def test_a_task_of_no_table_has_no_benchmark():
    assert benchmark_of("vqav2_val") is None and benchmark_of("mini_ai2d") is None


ONE_MORE = """
import json
from llava import benchmarks
new = benchmarks.Benchmark("VizWiz", "vizwiz_vqa_val", "exact_match", "vizwiz_vqa", group="photos", captions=True)
benchmarks.BENCHMARKS += (new,)

from llava.benchmark_tasks import definition_file, task_entry
from llava.eval.results.formats import cells
from llava.eval.results.rows import Row
from lmms_eval_otprune.models.java import needs_java
from lmms_eval_otprune.runner.options import read
from lmms_eval_otprune.runner.suites import GROUPS

header, [line] = cells([Row("llava", "unpruned", 1.0, {"VizWiz": 48.25})], intervals=False)
print(json.dumps({
    "column": line[header.index("VizWiz")],
    "columns": len(header),
    "group": GROUPS["otprune_photos"],
    "tasks": read(["paper", "--tasks", "vizwiz_vqa_val"]).tasks,
    "java": needs_java("vizwiz_vqa_val"),
    "defined": definition_file(new).exists(),
    "entry": task_entry("vizwiz_vqa_val", all_metrics=True),
}))
"""


def test_one_more_needs_no_other_change():
    pytest.importorskip("lmms_eval")
    done = subprocess.run([sys.executable, "-c", ONE_MORE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "column": "48.25",
        "columns": 4 + 1 + 2,
        "group": ["vizwiz_vqa_val"],
        "tasks": ["vizwiz_vqa_val"],
        "java": True,
        "defined": True,
        "entry": {"task": "vizwiz_vqa_val", "dataset_kwargs": None},
    }


def test_a_table_shows_whole_groups():
    paper = [benchmark for benchmark in BENCHMARKS if benchmark.group == "paper"]
    assert list(shown_columns({"GQA"})) == list(shown_columns(())) == paper
    assert len(paper) == 11


def test_a_task_of_no_table_is_a_column_of_its_first_metric_after_the_others():
    vqa = {"metrics": {"exact_match": 0.5, "submission": 1.0}}
    assert columns_of({"gqa": vqa, "vqav2_val": vqa})[:-1] == BENCHMARKS
    assert columns_of({"vqav2_val": vqa})[-1].metric == "exact_match"
    assert [column.key for column in shown_columns({"vqav2_val"})] == ["vqav2_val"]
    assert [column.key for column in shown_columns({"vqav2_val", "GQA"})][-2:] == ["SEED-I", "vqav2_val"]
