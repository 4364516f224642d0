"""Every task is tried once, whatever happens to the workers."""

from __future__ import annotations

import io
import json
import random
import sys
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from lmms_eval_otprune.runner import dispatch, options, records
from lmms_eval_otprune.runner.launch import Launch
from lmms_eval_otprune.runner.plan import Job
from lmms_eval_otprune.runner.screen import Screen
from rich.console import Console

from llava.benchmarks import BENCHMARKS as COLUMNS
from llava.eval.table import Row, Table

TASKS = tuple("abcd")
WORKER = """
import json, os, pathlib, sys
spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
fates = json.loads(pathlib.Path(sys.argv[0]).with_suffix(".json").read_text())
def say(**event): print(json.dumps(event), flush=True)
print("not an event")
if fates["start"] == "dies":
    sys.exit(3)
if fates["start"]:
    say(cannot_start=fates["start"])
    sys.exit(1)
while True:
    say(ready=True)
    unit = json.loads(sys.stdin.readline())
    if unit is None:
        break
    number, task = unit
    say(begins=unit)
    say(done=1, of=2)
    folder = pathlib.Path(spec["jobs"][number]["folder"], "tasks", task)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tries").open("a") as file:
        file.write("x")
    fate = fates["tasks"].get(f"{number}{task}")
    if fate == "dies":
        os._exit(9)
    if fate == "fails":
        (folder / "failure.json").write_text(json.dumps({"error": "its own reason"}))
    else:
        identity = spec["jobs"][number]["identities"][task]
        result = {"identity": identity, "metrics": {}, "visual_tokens": None, "samples": 2}
        (folder / "result.json").write_text(json.dumps(result))
    say(tried=unit)
"""


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Three rows of four tasks, and workers to which happens what ``fates`` say: rows, rows in the order in which they
    were finished, and what was printed.
    """
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launch = Launch((sys.executable, str(script)), {})
    jobs = [Job("model", None, tmp_path / "model" / name) for name in ("first", "second", "third")]
    identities = {job.folder: {task: {"task": task} for task in TASKS} for job in jobs}
    suite = SimpleNamespace(name="paper", tasks=TASKS)
    plan = SimpleNamespace(
        tasks=TASKS,
        device="cpu",
        dtype="float32",
        batch_size=1,
        pruned_batch_size=1,
        num_processes=1,
        suite=suite,
    )
    plan.visual_cache = 0

    def run(workers: int = 2, start: str = "", arguments: Sequence[str] = (), **fates: str):
        monkeypatch.setattr(dispatch, "describe_workers", lambda *_: (workers, launch))
        script.with_suffix(".json").write_text(json.dumps({"start": start, "tasks": fates}))
        finished: list[Job] = []
        shown = io.StringIO()

        def finish(job: Job) -> None:
            assert all(records.finished(job.folder, task, {"task": task}) or failed(job, task) for task in TASKS)
            finished.append(job)

        with Screen(12, Console(file=shown)) as screen:
            dispatch.evaluate(jobs, plan, options.read(arguments), identities, screen, finish)
        return jobs, finished, shown.getvalue()

    return run


def failed(job: Job, task: str) -> str | None:
    return records.failure(job.folder, task)


def tries(job: Job) -> Counter[str]:
    return Counter({path.parent.name: len(path.read_text()) for path in job.folder.glob("tasks/*/tries")})


@pytest.mark.parametrize("seed", range(6))
def test_a_task_costs_itself_alone(evaluate, seed):
    drawn = random.Random(seed)
    units = [f"{number}{task}" for number in range(3) for task in TASKS]
    fates = {unit: drawn.choice(("dies", "fails")) for unit in drawn.sample(units, drawn.randrange(6))}
    jobs, finished, shown = evaluate(drawn.randrange(1, 4), **fates)
    reasons = {"dies": "the worker ended with status 9", "fails": "its own reason", None: None}
    for number, job in enumerate(jobs):
        assert tries(job) == Counter(TASKS)
        assert {task: failed(job, task) for task in TASKS} == {
            task: reasons[fates.get(f"{number}{task}")] for task in TASKS
        }
    assert sorted(job.folder for job in finished) == sorted(job.folder for job in jobs)
    assert len([line for line in shown.splitlines() if line.startswith("model, ")]) == 12
    assert shown.count("FAILED") == len(fates)

    # Once more: only what failed is tried again, and now it succeeds.
    evaluate(2)
    for number, job in enumerate(jobs):
        again = [task for task in TASKS if f"{number}{task}" in fates]
        assert tries(job) == Counter(TASKS) + Counter(again)
        assert not any(failed(job, task) for task in TASKS)


def test_a_worker_gets_the_tasks_that_it_has_prepared():
    todo = deque((number, task) for number in range(2) for task in "abcd")
    first, second = (SimpleNamespace(tasks=set()) for _ in range(2))
    given = [dispatch._next(todo, worker) for worker in (first, second, second, second, second, second, first, first)]
    assert "".join(f"{number}{task}" for number, task in given) == "0a0b0c0d1b1c1a1d" and not todo


def test_a_worker_that_cannot_start_says_why_for_all_tasks(evaluate):
    jobs, finished, _ = evaluate(2, start="no such model")
    assert {failed(job, task) for job in jobs for task in TASKS} == {"no such model"}
    assert finished == jobs


def test_machines_that_do_not_meet_say_where(evaluate):
    meeting = ["--num-machines", "2", "--main-process-ip", "10.0.0.1"]
    jobs, _, _ = evaluate(1, start="dies", arguments=meeting)
    [said] = {failed(job, task) for job in jobs for task in TASKS}
    assert said == (
        "the worker ended with status 3 before its first task; "
        "2 machines were to meet at 10.0.0.1:29511 within 10 minutes"
    )


@pytest.fixture
def terminal(monkeypatch):
    """A terminal that can do more than print, whatever the tests run in."""
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_bars_and_the_table_and_leaves_lines(tmp_path):
    job = Job("model", None, Path(tmp_path) / "llava-mini" / "unpruned")
    records.write_json(
        records.task_folder(job.folder, "mini_gqa") / records.RESULT,
        {"metrics": {"exact_match": 0.5}, "samples": 240, "seconds": 7.2},
    )
    shown = io.StringIO()
    with Screen(2, Console(file=shown, force_terminal=True, width=120)) as screen:
        screen.begin("worker", job, "mini_gqa")
        screen.advance("worker", 12, 24)
        screen._live.refresh()
        screen.end(job, "mini_gqa")
        screen.leave("worker")
    assert "llava-mini, unpruned mini_gqa" in shown.getvalue() and "12/24" in shown.getvalue()
    assert "llava-mini, unpruned mini_gqa: GQA 50.00, 240 samples in 7 s\n" in shown.getvalue()


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("width", "names"), [(200, ["MMMU", "Mean"]), (80, ["Mean"])])
def test_the_table_has_the_columns_that_fit_and_cuts_no_number(width, names):
    scores = {column.key: 100.0 for column in COLUMNS}
    shown = io.StringIO()
    screen = Screen(1, Console(file=shown, force_terminal=True, width=width, color_system=None))
    screen.finish(Table((Row("llava-mini", "unpruned", 1.0, scores, relative=100.0),), ()))
    header = next(line for line in shown.getvalue().splitlines() if "Method" in line)
    assert [name for name in ("MMMU", "Mean") if name in header] == names
    assert "100.0 %" in shown.getvalue() and "\N{HORIZONTAL ELLIPSIS}" not in shown.getvalue()
