"""What a run says of its length before it begins."""

from __future__ import annotations

import pytest
from lmms_eval_otprune.runner import estimate, options, plan


@pytest.fixture
def seconds(monkeypatch):
    """The estimate for a command line, on a machine of the reference's speed."""
    monkeypatch.setattr(estimate, "_speed", lambda: estimate.REFERENCE)

    def of(*arguments: str, done: int = 0) -> float | None:
        chosen = options.read(["--device", "cpu", "--num-processes", "2", *arguments])
        made = plan.make_plan(chosen)
        units = [(job, task) for job in made.jobs for task in made.tasks]
        return estimate.estimate(units[done:], made, chosen.limit, chosen.report)

    return of


def test_more_work_takes_longer(seconds):
    less = [
        seconds("mini", "--tasks", "gqa", "--limit", "9"),
        seconds("mini", "--tasks", "gqa"),
        seconds("mini", "--tasks", "gqa,pope"),
        seconds("mini", "--method", "otprune", done=4),
        seconds("mini", "--method", "otprune"),
        seconds("mini", "--method", "otprune", "--ratio", "0.5"),
        seconds("mini", "--method", "otprune", "--ratio", "0.5", "--visual-cache", "off"),
    ]
    assert less == sorted(set(less))


def test_methods_whose_cost_the_model_decides_are_counted_by_their_ratio(seconds):
    alone = ("--no-unpruned", "--tasks", "gqa")
    by_ratio = [seconds("mini", *alone, "--method", f"fitprune:reduction_ratio={ratio}") for ratio in ("0.3", "0.6")]
    assert None not in by_ratio


def test_nothing_is_said_of_what_is_not_known(seconds):
    assert seconds("paper") is None
    assert seconds("mini", "--model", "somebody/llava-not-here") is None
    assert seconds("mini", "--tasks", "gqa", "--method", "none", done=1) is None


@pytest.mark.parametrize(
    ("spent", "words"), [(20, "about 1 min"), (350, "about 6 min"), (5000, "about 83 min"), (9000, "about 2.5 h")]
)
def test_is_told_as_a_person_would(spent, words):
    assert estimate.in_words(spent) == words
