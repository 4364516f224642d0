"""The embedded benchmarks that have to be read, through the runner with the model that reads."""

from __future__ import annotations

import pytest
from lmms_eval_otprune.runner.options import read
from lmms_eval_otprune.runner.plan import make_plan
from lmms_eval_otprune.tasks.ocrbench import share

from llava.eval.table import build_table, load_runs
from llava.files import write_json

KEYS = ("TextVQA", "ChartQA", "DocVQA", "OCRBench")


@pytest.fixture(scope="module")
def output(run, tmp_path_factory):
    """Unpruned, grey and one method on six documents each."""
    folder = tmp_path_factory.mktemp("documents")
    arguments = ["documents", "--grey", "--method", "random", "--limit", "6", "--num-processes", "1", "--no-report"]
    status, printed = run(folder, ["lmms_eval_otprune.runner", *arguments, "--device", "cpu", "--output", "out"])
    assert status == 0, printed
    return folder / "out"


def test_all_four_are_answered_and_scored_with_intervals(output):
    table = build_table(load_runs([output]), intervals=True)
    assert [row.method for row in table.rows] == ["grey picture", "unpruned", "random"]
    for row in table.rows:
        assert row.model == "llava-mini-reader"
        assert tuple(row.scores) == KEYS and all(0 <= score <= 100 for score in row.scores.values())
        assert set(row.evidence.intervals) >= set(KEYS)
    grey, unpruned, _ = table.rows
    assert sum(unpruned.scores.values()) > sum(grey.scores.values())


def test_what_an_earlier_command_evaluated_stays_a_task_of_the_folder(tmp_path):
    write_json(tmp_path / "manifest.json", {"tasks": ["mini_pope"]})
    chosen = read(["documents", "--output", str(tmp_path), "--device", "cpu", "--tasks", "textvqa_val,vqav2_val"])
    made = make_plan(chosen)
    assert made.tasks == ("mini_textvqa_val", "vqav2_val")
    assert made.suite.tasks[-2:] == ("mini_pope", "vqav2_val")


def test_a_group_stands_for_its_published_tasks():
    made = make_plan(read(["paper", "--tasks", "otprune_documents", "--device", "cpu"]))
    assert made.tasks == ("textvqa_val", "chartqa", "docvqa_val", "infovqa_val", "ocrbench", "ai2d")


def test_ocrbench_counts_one_run_alone():
    assert share([{"score": 1}, {"score": 0}]) == share([{"score": 1}, {"score": 0}]) == 0.5
