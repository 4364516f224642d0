"""OC-VTP's own variables reach the runs that prune, and no other."""

from __future__ import annotations

import pytest
from lmms_eval_otprune.runner import options, plan
from lmms_eval_otprune.runner.launch import describe_launch

from llava.pruning import PruningConfig


@pytest.fixture
def switched_on(monkeypatch):
    for name, value in {"OCL_ENABLE": "1", "OCL_TARGET_NUM": "40", "OCL_ATTSEL": "cls"}.items():
        monkeypatch.setenv(name, value)


def test_the_switch_may_be_written_in_capitals(switched_on, monkeypatch, tmp_path):
    monkeypatch.setenv("OCL_ENABLE", "True")
    made = plan.make_plan(options.read(["mini", "--output", str(tmp_path)]))
    assert [job.pruning and job.pruning.method for job in made.jobs] == [None, "ocvtp"]


def test_the_pruned_run_gets_them_and_the_unpruned_one_does_not(switched_on, tmp_path):
    chosen = options.read(["mini", "--output", str(tmp_path)])
    made = plan.make_plan(chosen)
    assert [job.pruning and job.pruning.method for job in made.jobs] == [None, "ocvtp"]
    rest = describe_launch(made, chosen, 1).environment
    assert PruningConfig.from_env(rest) is None
    pruned = PruningConfig.from_env({**rest, **made.jobs[1].switch})
    assert dict(pruned.options) == {"target": 40, "attention": "cls"} and pruned.ratio is None


def test_a_second_switch_beside_them_is_refused(switched_on, monkeypatch, tmp_path):
    monkeypatch.setenv("BASELINE", "RANDOM")
    with pytest.raises(ValueError, match="BASELINE=RANDOM is set beside OCL_ENABLE=1"):
        plan.make_plan(options.read(["mini", "--output", str(tmp_path)]))


def test_switched_off_the_default_method_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("OCL_ENABLE", "0")
    made = plan.make_plan(options.read(["mini", "--output", str(tmp_path)]))
    assert [job.pruning and job.pruning.method for job in made.jobs] == [None, "otprune", "random", "divprune"]
