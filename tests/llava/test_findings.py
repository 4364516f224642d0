"""The sentences that a table says."""

from __future__ import annotations

import re

import pytest

from llava.eval.results.findings import findings
from llava.eval.table import build_table, load_runs
from run_folders import job, write_run


def right(share: float, **about):
    answers = {task: [number < 50 * share for number in range(50)] for task in ("mini_gqa", "mini_pope")}
    return job(answers, **about)


UNPRUNED = right(1)


def said(tmp_path, jobs, intervals: bool = True) -> list[str]:
    return findings(build_table(load_runs([write_run(tmp_path, jobs)]), intervals=intervals).rows)


def test_name_the_leader_the_next_and_random_with_intervals(tmp_path):
    jobs = {"unpruned": UNPRUNED}
    for method, share in (("random", 0.3), ("otprune", 0.8), ("divprune", 0.78)):
        jobs[method] = right(share, method=method, kept=56)
    leader, following, random = said(tmp_path, jobs)
    assert re.fullmatch(
        r"At \d+\.\d % of the visual tokens otprune 0.098 leads with \d+\.\d % of the unpruned score \[.*\]\.", leader
    )
    assert following.startswith("divprune 0.098 is ") and following.endswith(", which may be chance.")
    assert random.startswith("Random 0.098 is ") and "chance" not in random


def test_do_without_intervals_where_there_are_none(tmp_path):
    jobs = {"unpruned": UNPRUNED} | {
        method: right(share, method=method, kept=56) for method, share in (("otprune", 0.8), ("uniform", 0.4))
    }
    leader, following = said(tmp_path, jobs, intervals=False)
    assert leader.endswith("% of the unpruned score.") and re.fullmatch(
        r"uniform 0.098 is .* points behind\.", following
    )


@pytest.mark.parametrize("method", [None, "otprune"])
def test_there_are_none_without_two_methods_of_one_budget(tmp_path, method):
    alone = {} if method is None else {"alone": right(0.8, method=method, kept=56)}
    other = {"other": right(0.9, method="fastv", kept=300, layer=2)}
    assert said(tmp_path, {"unpruned": UNPRUNED, **alone, **other}) == []
