"""``python -m lmms_eval_otprune.runner``: what it plans, what it leaves behind, and what it survives."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from lmms_eval_otprune.models import java
from lmms_eval_otprune.runner import dispatch, lock, options, plan, records
from lmms_eval_otprune.runner.__main__ import main
from lmms_eval_otprune.runner.launch import KEEPING_MEMORY, describe_launch

from llava.model.llava_arch import gamma_for_width

RUNNER = "lmms_eval_otprune.runner"
PRUNED = "otprune-0.5"
ROWS = 8
LEFT_OVER = {
    **{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"},
    **{"TORCHELASTIC_USE_AGENT_STORE": "True", "PET_NNODES": "2", "OMPI_COMM_WORLD_SIZE": "2", "PMI_SIZE": "2"},
    **{"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "ACCELERATE_USE_FSDP": "true"},
}


@pytest.fixture(scope="module")
def command(tiny_checkpoint) -> Callable[..., list[str]]:
    """A run of the tiny checkpoint on the published benchmarks that the working folder has."""

    def build(output: str, tasks: str = "gqa,mme,pope", *more: str, report: bool = False) -> list[str]:
        chosen = ["--tasks", tasks, "--ratio", "0.5", "--device", "cpu", "--output", output, *more]
        chosen += [] if report else ["--no-report"]
        return [RUNNER, "paper", "--model", tiny_checkpoint(), *chosen]

    return build


@pytest.fixture(scope="module")
def reference(workplace, run, command) -> Path:
    """One process, unpruned and OTPrune, in a shell where another launch has left its variables."""
    status, printed = run(workplace, command("reference"), **LEFT_OVER)
    assert status == 0, printed
    return workplace / "reference"


METRICS = {
    "gqa": {"exact_match": 1.0},
    "mme": {"mme_perception_score": 1500.0},
    "pope": {"pope_f1_score": 1.0},
}


def job(output: Path, name: str = PRUNED) -> Path:
    return output / "llava-v1.5-tiny" / name


def answers(output: Path, task: str, name: str = PRUNED) -> dict[int, str]:
    """Document -> answer, from lmms-eval's own log of samples."""
    [log] = (job(output, name) / "tasks" / task).glob(f"*/*_samples_{task}.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(samples) == len({sample["doc_id"] for sample in samples})
    return {sample["doc_id"]: sample["filtered_resps"] for sample in samples}


def results(output: Path, name: str = PRUNED) -> dict:
    return json.loads((job(output, name) / "results.json").read_text())


def jobs(*arguments: str) -> list[plan.Job]:
    """What would be run with the embedded model, the unpruned run left out."""
    chosen = options.read(["mini", "--device", "cpu", "--no-unpruned", "--method", "otprune", *arguments])
    return list(plan.make_plan(chosen).jobs)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metrics(output: Path) -> dict[str, dict[str, float]]:
    return {task: result["metrics"] for task, result in results(output)["tasks"].items()}


class TestResults:
    def test_hold_every_task_with_its_metrics_and_kept_tokens(self, reference):
        found = results(reference)
        assert list(found["tasks"]) == ["gqa", "mme", "pope"]
        assert (found["pruning"]["method"], found["pruning"]["ratio"], found["pruning"]["layer"]) == ("otprune", 0.5, 0)
        assert found["pruning"]["options"]["gamma"] == gamma_for_width(64)
        assert "exact_match" in found["tasks"]["gqa"]["metrics"]
        assert "mme_perception_score" in found["tasks"]["mme"]["metrics"]
        assert all(result["samples"] == ROWS for result in found["tasks"].values())
        tokens = found["visual_tokens"]
        assert tokens["images"] == 3 * ROWS
        assert tokens["total"] == {"min": 16, "mean": 16, "max": 16}
        assert tokens["kept"] == {"min": 8, "mean": 8, "max": 8}
        assert tokens["per_layer"] == [8, 8, 8]
        assert found["tasks"]["gqa"]["visual_tokens"]["images"] == ROWS
        # The unpruned run has encoded every image.
        assert found["tasks"]["gqa"]["visual_cache"] == {"hits": ROWS, "misses": 0}
        assert results(reference, "unpruned")["visual_tokens"]["kept"]["min"] == 16
        assert not (reference / "encoded-images").exists()
        assert len(answers(reference, "gqa")) == ROWS

    def test_hold_the_cost_of_the_prefill_relative_to_unpruned(self, reference):
        pruned, unpruned = (results(reference, name)["visual_tokens"] for name in (PRUNED, "unpruned"))
        assert unpruned["flops_ratio"] == {"literature": 1, "exact": 1}
        for convention in ("literature", "exact"):
            assert pruned["flops"][convention]["unpruned"] == unpruned["flops"][convention]["pruned"]
            assert 0 < pruned["flops_ratio"][convention] < 1

    def test_say_what_they_were_made_with(self, reference):
        manifest = json.loads((job(reference) / "manifest.json").read_text())
        assert manifest["switch"] == {"BASELINE": "OTPRUNE", "SUBSET_RATIO": "0.5", "LAYER_INDEX": "0"}
        assert manifest["suite"] == "paper"
        assert (manifest["device_type"], manifest["dtype"], manifest["processes"]) == ("cpu", "float32", 1)
        assert (manifest["seeds"]["torch"], manifest["conv_template"]) == (1234, "vicuna_v1")
        assert manifest["versions"].keys() >= {"python", "torch", "transformers", "lmms-eval", "llava"}
        assert manifest["visual_tokens"] == results(reference)["visual_tokens"]
        assert "git_commit" in manifest
        whole = json.loads((reference / "manifest.json").read_text())
        assert whole["command"].startswith("run_OTPrune.sh paper --model")

    def test_are_a_table_in_three_formats(self, reference):
        markdown = (reference / "table.md").read_text()
        assert "| llava-v1.5-tiny | unpruned | 16 / 16 (100.0 %) | 100.0 % |" in markdown
        assert "| llava-v1.5-tiny | otprune 0.5 | 8 / 16 (50.0 %) |" in markdown
        rows = list(csv.DictReader((reference / "table.csv").open()))
        assert [row["method"] for row in rows] == ["unpruned", "otprune"]
        assert [row["method"] for row in json.loads((reference / "table.json").read_text())["rows"]] == [
            "unpruned",
            "otprune",
        ]

    def test_are_a_report_at_the_end(self, workplace, reference, run, command):
        log = job(reference) / "worker.log"
        before = log.read_text(), (reference / "table.md").read_text()
        status, printed = run(workplace, command("reference", report=True))
        assert status == 0, printed
        # What is finished is not done again.
        assert (log.read_text(), (reference / "table.md").read_text()) == before
        assert before[1] in printed and "Loading weights" not in printed
        page = (reference / "report.html").read_text()
        # The second row finds the images that the first has encoded; times leave encoding out.
        assert "otprune 0.5" in page and '<h2 id="time">' in page
        assert "Report: reference/report.html" in printed


def test_processes_that_do_not_find_each_other_say_so():
    code = (
        "import datetime\nfrom lmms_eval_otprune.models import group\n"
        "group.JOIN = datetime.timedelta(seconds=1)\ngroup.join()"
    )
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **alone, "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("RuntimeError")]
    assert f"2 processes were to meet at 127.0.0.1:{alone['MASTER_PORT']} within" in line
    assert "1/2 clients joined" in line and "(this is RANK=0 of WORLD_SIZE=2)" in line


class TestSameAnswers:
    def test_of_processes_that_work_alone_at_several_rows(self, workplace, reference, run, command):
        arguments = command("alone", "gqa,mme,pope", "--num-processes", "2", "--method", "otprune,vtw:layer=2")
        status, printed = run(workplace, arguments)
        assert status == 0, printed
        output = workplace / "alone"
        assert json.loads((job(output) / "manifest.json").read_text())["processes"] == 2
        assert {path.name for path in output.rglob("answers_rank*.jsonl")} == {
            "answers_rank0.jsonl",
            "answers_rank1.jsonl",
        }
        for name in (PRUNED, "unpruned"):
            found, expected = results(output, name), results(reference, name)
            for task in ("gqa", "mme", "pope"):
                assert answers(output, task, name) == answers(reference, task, name)
                assert found["tasks"][task]["visual_tokens"] == expected["tasks"][task]["visual_tokens"]
        found = results(output, "vtw-layer2")
        assert (found["pruning"]["ratio"], found["pruning"]["layer"]) == (None, 2)
        assert found["visual_tokens"]["per_layer"] == [16, 16, 0]
        shown = "10.67 of 16 visual tokens an image (mean over the decoder layers: 16 x2, 0 x1), prefill FLOPs "
        assert f"llava-v1.5-tiny, vtw-layer2: {shown}" in printed
        assert "| llava-v1.5-tiny | vtw, layer 2 | 10.67 / 16 (66.7 %) |" in printed

    def test_of_two_machines(self, workplace, reference, start, command):
        meeting = ["--num-machines", "2", "--main-process-ip", "127.0.0.1", "--main-process-port", str(free_port())]
        machines = [
            start(
                workplace,
                command(f"machine{rank}", "gqa,mme,pope", "--no-unpruned", *meeting, "--machine-rank", str(rank)),
                **LEFT_OVER,
            )
            for rank in (0, 1)
        ]
        printed = [machine.communicate(timeout=300)[0] for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], printed
        output = workplace / "machine0"
        assert answers(output, "gqa") == answers(reference, "gqa")
        assert metrics(output) == metrics(reference)
        assert not (job(workplace / "machine1") / "tasks" / "gqa" / "result.json").exists()

    def test_of_a_run_that_was_killed_and_started_again(self, workplace, reference, run, start, command):
        output = workplace / "killed"
        arguments = command("killed", "pope", "--batch-size", "1", "--no-unpruned")
        log = job(output) / "answers-published" / "answers_rank0.jsonl"
        process = start(workplace, arguments)
        while not (log.exists() and len(log.read_text().splitlines()) >= 2):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.kill()
        # The pipe that the worker prints into closes when it is gone as well.
        process.communicate(timeout=60)
        answered = log.read_text().splitlines()
        assert len(answered) < ROWS
        assert not (job(output) / "tasks" / "pope" / "result.json").exists()

        status, printed = run(workplace, arguments)
        assert status == 0, printed
        assert log.read_text().splitlines()[: len(answered)] == answered
        assert len(log.read_text().splitlines()) == ROWS
        assert answers(output, "pope") == answers(reference, "pope")
        assert metrics(output)["pope"] == metrics(reference)["pope"]
        assert results(output)["tasks"]["pope"]["visual_tokens"] == results(reference)["tasks"]["pope"]["visual_tokens"]


class TestFailures:
    def test_of_one_task_cost_that_task_alone(self, tmp_path, write_benchmarks, run, command):
        write_benchmarks(tmp_path, mme_answer="perhaps")
        # The cache of the datasets library does not notice that a local folder was written anew.
        status, printed = run(tmp_path, command("out", "mme,pope", "--no-unpruned"), HF_HOME=str(tmp_path / "hf"))
        assert status == 1
        assert f"FAILED llava-v1.5-tiny, {PRUNED}, mme: AssertionError" in printed
        assert list(results(tmp_path / "out")["tasks"]) == ["pope"]
        assert list(results(tmp_path / "out")["failed"]) == ["mme"]
        assert "mme failed" in (tmp_path / "out" / "table.md").read_text()

    def test_of_a_task_is_also_that_it_left_no_result(self, tmp_path, command, monkeypatch, capsys):
        monkeypatch.setattr(dispatch, "evaluate", lambda *_: None)
        assert main(command(str(tmp_path / "out"), "gqa,pope", "--no-unpruned")[1:]) == 1
        assert f"FAILED llava-v1.5-tiny, {PRUNED}, gqa, pope: it has no result" in capsys.readouterr().err

    def test_are_printed_where_they_cannot_be_written_down(self, tmp_path, monkeypatch, capsys):
        def full(path: Path, *_, **__):
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(Path, "write_bytes", full)
        records.record_failure(tmp_path, "gqa", "ValueError: the cause")
        error = capsys.readouterr().err
        assert error.startswith("FAILED gqa: ValueError: the cause (not recorded: ")
        assert error.endswith("No space left on device)\n")
        assert not list(tmp_path.rglob("*.part"))

    @pytest.mark.parametrize("output", ["file", "file/below"])
    def test_of_the_output_folder_are_told_in_one_sentence(self, tmp_path, capsys, output):
        (tmp_path / "file").touch()
        status = main(["mini", "--device", "cpu", "--output", str(tmp_path / output)])
        error = capsys.readouterr().err
        assert status == 1
        assert error.startswith(f"run_OTPrune.sh: {tmp_path / output}: ") and len(error.splitlines()) == 1


class TestTableOfAFolder:
    """Holds every finished row and column, whatever the command asked for that wrote it last."""

    @pytest.fixture
    def evaluate(self, tmp_path, command, monkeypatch) -> Callable[..., list[dict]]:
        """Run a command whose workers get every answer right; returns the table's rows."""

        def answer(made_jobs: list[plan.Job], made: plan.Plan, _: options.Options, identities: dict, *rest) -> None:
            _, finished = rest
            for job in made_jobs:
                for task in made.tasks:
                    found = {"metrics": METRICS[task], "visual_tokens": None, "samples": 1, "seconds": 1}
                    result = {"identity": identities[job.folder][task], **found}
                    records.write_json(job.folder / "tasks" / task / "result.json", result)
                finished(job)

        def run(tasks: str, *more: str) -> list[dict]:
            assert main(command(str(tmp_path / "out"), tasks, *more)[1:]) == 0
            return list(csv.DictReader((tmp_path / "out" / "table.csv").open()))

        monkeypatch.setattr(dispatch, "evaluate", answer)
        return run

    def test_holds_the_tasks_of_earlier_commands(self, evaluate, tmp_path):
        evaluate("gqa,mme")
        rows = evaluate("pope")
        assert [(row["GQA"], row["MME-P"], row["POPE"]) for row in rows] == [("100.0", "1500.0", "100.0")] * 2
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["tasks"] == ["gqa", "mme", "pope"]

    def test_holds_the_methods_of_earlier_commands_in_their_order(self, evaluate, tmp_path):
        evaluate("gqa")
        rows = evaluate("gqa", "--method", "random", "--no-unpruned")
        assert [row["method"] for row in rows] == ["unpruned", "otprune", "random"]
        whole = json.loads((tmp_path / "out" / "results.json").read_text())
        assert len(whole["runs"]) == 3

    def test_says_what_other_settings_keep_out_of_it(self, evaluate, capsys):
        evaluate("gqa", "--no-unpruned")
        capsys.readouterr()
        [row] = evaluate("pope", "--no-unpruned", "--limit", "4")
        assert (row["GQA"], row["POPE"]) == ("", "100.0")
        said = "gqa had other settings or another version, and are left out"
        assert f"llava-v1.5-tiny, {PRUNED}: {said}" in capsys.readouterr().out
        [row] = evaluate("pope", "--no-unpruned")
        assert (row["GQA"], row["POPE"]) == ("100.0", "100.0")

    def test_names_what_it_cannot_read(self, evaluate, tmp_path, capsys):
        evaluate("gqa")
        damaged = job(tmp_path / "out", "unpruned") / "results.json"
        damaged.write_text("{")
        rows = evaluate("gqa", "--no-unpruned", "--method", "otprune,random")
        assert [row["method"] for row in rows] == ["otprune", "random"]
        assert capsys.readouterr().out.count(f"Left out of the table: {damaged} cannot be read") == 1

    def test_is_written_while_a_row_to_come_has_results_of_another_shape(self, evaluate, tmp_path, capsys):
        evaluate("gqa")
        stale = job(tmp_path / "out") / "results.json"
        content = json.loads(stale.read_text())
        del content["pruning"]["options"]
        stale.write_text(json.dumps(content))
        assert [row["method"] for row in evaluate("gqa")] == ["unpruned", "otprune"]
        # Nothing is left out in the end.
        assert "Left out of the table" not in capsys.readouterr().out


class TestOneRunAtATime:
    def test_a_second_run_into_the_same_folder_is_refused(self, tmp_path, capsys):
        with lock.locked(tmp_path, 0):
            assert main(["mini", "--device", "cpu", "--output", str(tmp_path)]) == 1
        assert capsys.readouterr().err == (
            f"run_OTPrune.sh: another run is writing into {tmp_path}: wait for its end, or choose another --output\n"
        )

    def test_the_machines_of_one_run_share_a_folder(self, tmp_path):
        with lock.locked(tmp_path, 0), lock.locked(tmp_path, 1):
            pass

    def test_a_run_that_was_killed_holds_nothing(self, tmp_path):
        code = (
            "import pathlib, sys, time\nfrom lmms_eval_otprune.runner.lock import locked\n"
            "with locked(pathlib.Path(sys.argv[1]), 0):\n    print('held', flush=True); time.sleep(60)"
        )
        holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OSError, match="another run"), lock.locked(tmp_path, 0):
            pass
        holder.kill()
        holder.communicate()
        with lock.locked(tmp_path, 0):
            pass


def test_a_terminal_shows_what_its_encoding_lacks_as_escapes(tmp_path, monkeypatch):
    (tmp_path / "小").mkdir()
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="iso-8859-1"))
    assert main(["mini", "--device", "cpu", "--dry-run", "--model", str(tmp_path / "小")]) == 0
    sys.stdout.flush()
    assert rb"\u5c0f: unpruned" in shown.getvalue()


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--ratio", "0"], "--ratio: must be a number with 0 < r <= 1, not 0"),
            (["--ratio", "0.1,1.5"], "--ratio: must be a number with 0 < r <= 1, not 1.5"),
            (["--ratio", "abc"], "--ratio: must be a number with 0 < r <= 1, not abc"),
            (["--ratio", ","], "--ratio: names nothing: ','"),
            (["--ratio", ""], "--ratio: must be a number with 0 < r <= 1, not"),
            (["--method", " ,"], "--method: names nothing: ' ,'"),
            (["--tasks", ",,"], "--tasks: names nothing: ',,'"),
            (["--ratio", "nan"], "--ratio: must be a number with 0 < r <= 1, not nan"),
            (["--layer", "-1"], "--layer: must be a whole number >= 0, not -1"),
            (["--layer", "x"], "--layer: must be a whole number >= 0, not x"),
            (
                ["mini", "--layer", "99", "--device", "cpu"],
                "otprune-0.098-layer99: LAYER_INDEX=99 is outside the decoder",
            ),
            (["mini", "--method", "sparsevlm:ratio=0.01", "--device", "cpu"], "SUBSET_RATIO=0.01 is out of reach"),
            (
                ["--method", "fastv,pyramiddrop", "--layer", "2", "--device", "cpu"],
                "pyramiddrop: LAYER_INDEX=2 must be",
            ),
            (["--method", "fastv:layer=0", "--device", "cpu"], "LAYER_INDEX must be at least 1"),
            (["--method", "fastv:layer=x", "--device", "cpu"], "--method fastv:layer=x: LAYER_INDEX=x"),
            (["--method", "fastv:ratio=2", "--device", "cpu"], "--method fastv:ratio=2: SUBSET_RATIO=2"),
            (["--method", "vtw:ratio=0.5:layer=2", "--device", "cpu"], "not both"),
            (
                ["--method", "pyramiddrop:schedule=published:ratio=0.5", "--device", "cpu"],
                "SUBSET_RATIO=0.5 must be left out",
            ),
            (["--method", "fastv,fastv:layer=2", "--device", "cpu"], "fastv-0.098-layer2 is asked for twice"),
            (["--tasks", "popo"], "lmms-eval has no task 'popo'; the nearest: pope, "),
            (["--limit", "0"], "--limit: must be a whole number >= 1, not 0"),
            (["--limit", "1_0"], "--limit: must be a whole number >= 1, not 1_0"),
            (["--num-processes", "-2"], "--num-processes: must be a whole number >= 1, not -2"),
            (["--batch-size", "x"], "--batch-size: must be a whole number >= 1, not x"),
            (
                ["--main-process-port", "65536"],
                "--main-process-port: must be a whole number from 1 to 65535, not 65536",
            ),
            (["--seed", "-1"], "--seed: must be a whole number from 0 to 4294967295, not -1"),
            (["--seed", "4294967296"], "--seed: must be a whole number from 0 to 4294967295, not 4294967296"),
            (["--layer", "1_0"], "--layer: must be a whole number >= 0, not 1_0"),
            (["--ratio", "0.1_0"], "--ratio: must be a number with 0 < r <= 1, not 0.1_0"),
            (["--method", "random:ratio=0.1:ratio=0.2", "--device", "cpu"], "ratio is given twice"),
            (["--method", "random:seed=1:SEED=2", "--device", "cpu"], "seed is given twice"),
            (["--method", "random:seed=1_0", "--device", "cpu"], "RANDOM_SEED=1_0: must be a whole number"),
            (["--method", "random,random", "--device", "cpu"], "random-0.098 is asked for twice"),
            (["--model", "a/b,a/b", "--device", "cpu"], "a/b is given twice"),
            (["--model", "a/x,b/x", "--device", "cpu"], "a/x and b/x would both be x in the table"),
            (["--num-machines", "2", "--machine-rank", "2"], "--machine-rank 2"),
            (["--num-machines", "2"], "--main-process-ip"),
            (["--method", "otprune:gamma", "--device", "cpu"], "an option reads name=value"),
            (["--method", "none", "--no-unpruned"], "leaves nothing to run"),
            (["large"], "invalid choice: 'large'"),
            (["--visual-cache", "on"], "--visual-cache: must be a number >= 0, or off, not on"),
            (["--visual-cache", "-1"], "--visual-cache: must be a number >= 0, or off, not -1"),
            (["--visual-cache", "inf"], "--visual-cache: must be a number >= 0, or off, not inf"),
            (["--dtype", "int8"], "invalid choice: 'int8'"),
            (["--method", "nosuch", "--device", "cpu"], "--method nosuch: unknown method 'nosuch'"),
            (["--method", "otprune:gama=1", "--device", "cpu"], "OTPRUNE_GAMA=1"),
            (["--method", "otprune:gamma=x", "--device", "cpu"], "OTPRUNE_GAMMA=x"),
            (["--conv-template", "vicuna", "--device", "cpu"], "--conv-template vicuna: allowed are auto, default"),
            (["--model", "/no/such/folder", "--device", "cpu"], "--model /no/such/folder: neither a folder"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_wrong_values_fail_at_once_with_one_sentence(self, arguments, sentence, capsys):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
        error = capsys.readouterr().err
        assert status == 2
        assert sentence in error
        assert len(error.splitlines()) == 1

    def test_help_names_every_choice(self, capsys):
        with pytest.raises(SystemExit):
            options.read(["--help"])
        text = capsys.readouterr().out
        assert all(f"--{name}" in text for name in ("model", "ratio", "method", "tasks", "limit", "num-processes"))

    def test_a_dry_run_says_what_it_would_do_and_does_nothing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        arguments = ["mini", "--method", "otprune,random:seed=1", "--ratio", "0.05,0.2", "--device", "cpu", "--dry-run"]
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert "mini suite, 5 rows" in text
        assert "BASELINE=RANDOM RANDOM_SEED=1 SUBSET_RATIO=0.2" in text
        assert "random keeps 5 % of the visual tokens" in text
        assert not list(tmp_path.iterdir())

    def test_the_switch_of_the_environment_is_the_default(self, monkeypatch):
        monkeypatch.setenv("BASELINE", "RANDOM")
        monkeypatch.setenv("SUBSET_RATIO", "0.25")
        found = options.read([])
        assert (found.methods, found.ratios, found.layer) == (("RANDOM",), (0.25,), None)
        assert options.read(["--method", "otprune"]).methods == ("otprune",)


class TestBudgets:
    """--ratio and --layer, and what a method's text says instead."""

    def test_a_method_with_a_budget_of_its_own_runs_once_without_the_ratio(self):
        published, otprune, more = jobs("--method", "pyramiddrop:schedule=published,otprune", "--ratio", "0.3,0.6")
        assert published.switch == {"BASELINE": "PYRAMIDDROP", "PYRAMIDDROP_SCHEDULE": "published"}
        assert (published.pruning.ratio, published.folder.name) == (None, "pyramiddrop-schedulepublished")
        assert [otprune.pruning.ratio, more.pruning.ratio] == [0.3, 0.6]

    def test_fitprune_takes_a_recipe_a_reduction_ratio_or_a_ratio(self):
        texts = "fitprune:recipe=llava-1.5-7b/60", "fitprune:reduction_ratio=0.6", "fitprune:ratio=0.4"
        recipe, reduction, ratio = jobs("--method", ",".join(texts), "--model", "liuhaotian/llava-v1.5-7b")
        assert recipe.switch == {"BASELINE": "FITPRUNE", "FITPRUNE_RECIPE": "llava-1.5-7b/60"}
        assert reduction.switch == {"BASELINE": "FITPRUNE", "FITPRUNE_REDUCTION_RATIO": "0.6"}
        assert ratio.switch == {"BASELINE": "FITPRUNE", "SUBSET_RATIO": "0.4"}
        assert len({recipe.folder, reduction.folder, ratio.folder}) == 3

    def test_a_schedule_in_the_environment_counts_as_well(self, monkeypatch):
        monkeypatch.setenv("PYRAMIDDROP_SCHEDULE", "published")
        assert [job.pruning.ratio for job in jobs("--method", "pyramiddrop")] == [None]

    def test_a_method_whose_layer_is_its_budget_takes_ratios_only_without_one(self):
        [withdrawn] = jobs("--method", "vtw", "--layer", "4", "--ratio", "0.3,0.6")
        assert (withdrawn.switch, withdrawn.folder.name) == ({"BASELINE": "VTW", "LAYER_INDEX": "4"}, "vtw-layer4")
        by_ratio = jobs("--method", "vtw", "--ratio", "0.3,0.6")
        assert [job.switch.get("LAYER_INDEX") for job in by_ratio] == [None, None]
        assert [job.folder.name for job in by_ratio] == ["vtw-0.3", "vtw-0.6"]

    def test_a_ratio_and_a_layer_of_one_method_are_for_that_method(self):
        found = jobs("--method", "fastv:layer=3,divprune:ratio=0.2:layer=1,random:seed=7,fastv", "--ratio", "0.1")
        assert [(job.pruning.method, job.pruning.ratio, job.pruning.layer) for job in found] == [
            ("fastv", 0.1, 3),
            ("divprune", 0.2, 1),
            ("random", 0.1, 0),
            ("fastv", 0.1, 2),
        ]
        assert found[0].switch == {"BASELINE": "FASTV", "SUBSET_RATIO": "0.1", "LAYER_INDEX": "3"}

    def test_the_command_s_layer_is_for_every_method_without_one(self):
        found = jobs("--method", "otprune,fastv:layer=3,pyramiddrop:layer=", "--layer", "1", "--ratio", "0.5")
        assert [job.pruning.layer for job in found] == [1, 3, None]

    def test_a_name_with_a_sign_takes_options(self):
        [job] = jobs("--method", "prumerge+:adaptive=1")
        assert (job.pruning.options, job.pruning.ratio) == ({"adaptive": True}, None)


class TestPlan:
    def test_without_a_suite_follows_the_machine(self, monkeypatch):
        monkeypatch.setattr(plan.torch.cuda, "is_available", lambda: False)
        mini = plan.make_plan(options.read([]))
        assert (mini.suite.name, mini.dtype, mini.device) == ("mini", "float32", "cpu")
        assert (mini.batch_size, mini.pruned_batch_size, mini.visual_cache) == (8, 16, 8 * 2**30)
        small = plan.make_plan(options.read(["--batch-size", "3"]))
        assert (small.batch_size, small.pruned_batch_size) == (3, 3)
        assert [job.folder.as_posix() for job in mini.jobs] == [
            f"results/mini/llava-mini/{name}"
            for name in ("unpruned", "otprune-0.098", "random-0.098", "divprune-0.098")
        ]
        monkeypatch.setattr(plan.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(plan.torch.cuda, "device_count", lambda: 4)
        paper = plan.make_plan(options.read([]))
        assert (paper.suite.name, paper.dtype, paper.num_processes, paper.batch_size) == ("paper", "float16", 4, 1)
        assert paper.visual_cache == 0
        assert plan.make_plan(options.read(["--visual-cache", "0.5"])).visual_cache == 2**29
        assert plan.make_plan(options.read(["--visual-cache", "off"])).visual_cache is None
        assert [job.model for job in paper.jobs[::2]] == [
            "liuhaotian/llava-v1.5-7b",
            "liuhaotian/llava-v1.6-vicuna-7b",
            "liuhaotian/llava-v1.5-13b",
        ]

    def test_without_java_leaves_the_captions_out_and_says_so_in_one_line(self, monkeypatch, capsys):
        java.java_works.cache_clear()
        monkeypatch.setattr(java.shutil, "which", lambda _: None)
        assert main(["mini", "--device", "cpu", "--dry-run"]) == 0
        java.java_works.cache_clear()
        first = capsys.readouterr().out.splitlines()[0]
        assert "mini_coco2017_cap_val, mini_flickr30k_test, mini_nocaps_val" in first
        assert "default-jre-headless" in first

    def test_a_worker_has_no_switch_but_that_of_each_row(self, monkeypatch):
        monkeypatch.setenv("SUBSET_RATIO", "0.3")
        chosen = options.read(["mini", "--device", "cpu", "--num-processes", "2"])
        made = plan.make_plan(chosen)
        number, launch = dispatch.describe_workers(made, chosen, units=7)
        assert number == 1 and "--nproc_per_node=2" in launch.command
        assert not set(plan.SWITCH) & launch.environment.keys()
        assert launch.environment["ACCELERATE_USE_CPU"] == "true"

    def test_a_worker_on_a_cpu_keeps_its_memory_unless_the_user_decides(self, monkeypatch):
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "5")
        for device, expected in (("cpu", ("5", "33554432")), ("cuda", ("5", None))):
            made = SimpleNamespace(device=device, num_processes=1)
            environment = describe_launch(made, options.read(["mini"]), 1).environment
            assert tuple(map(environment.get, KEEPING_MEMORY)) == expected

    def test_with_enough_to_do_the_processes_of_a_cpu_work_alone(self):
        chosen = options.read(["mini", "--device", "cpu", "--num-processes", "2"])
        number, launch = dispatch.describe_workers(plan.make_plan(chosen), chosen, units=8)
        assert number == 2 and "torch.distributed.run" not in launch.command
        number, launch = dispatch.describe_workers(plan.make_plan(chosen), chosen, units=1, wrapped=True)
        assert number == 1 and "torch.distributed.run" not in launch.command

    @pytest.mark.parametrize(
        "arguments",
        [["--grey"], ["--model-base", "a/b"], ["--num-machines", "2", "--main-process-ip", "10.0.0.1"]],
        ids=lambda arguments: arguments[0],
    )
    def test_what_lmms_eval_s_wrappers_cannot_do_is_refused(self, tmp_path, arguments):
        config = {"model_type": "qwen2_5_vl", "vision_config": {}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert {job.wrapper for job in jobs("--model", str(tmp_path))} == {"qwen2_5_vl"}
        with pytest.raises(ValueError, match=f"{arguments[0]} is for LLaVA's own checkpoints"):
            jobs("--model", str(tmp_path), *arguments)


class TestFolders:
    """Where results go: inside the output folder, each model's apart."""

    @pytest.mark.parametrize("model", ["..", ".", "../..", "models/..", ".hidden", "with, comma", "owner/" + 200 * "x"])
    def test_of_a_model_lie_inside_the_output_folder(self, tmp_path, monkeypatch, model):
        here = tmp_path / "some" / "where"
        for name in ("models", ".hidden", "with, comma"):
            (here / name).mkdir(parents=True)
        monkeypatch.chdir(here)
        [found] = jobs("--model", model, "--output", "out")
        assert found.folder.resolve().parent.parent == here / "out"
        assert not found.folder.parent.name.startswith(".")
        found.folder.mkdir(parents=True)

    def test_of_a_training_run_s_checkpoint_carry_the_run_s_name(self, tmp_path):
        folders = [tmp_path / run / "checkpoint-100" for run in ("first", "second")]
        for folder in folders:
            folder.mkdir(parents=True)
        found = jobs("--model", ",".join(map(str, folders)))
        assert [job.folder.parent.name for job in found] == ["first_checkpoint-100", "second_checkpoint-100"]

    def test_of_another_model_are_not_written_over(self, tmp_path):
        for owner in ("first", "second"):
            (tmp_path / owner / "tuned").mkdir(parents=True)
        first, second = (str(tmp_path / owner / "tuned") for owner in ("first", "second"))
        arguments = ["--output", str(tmp_path / "out"), "--model"]
        [job] = jobs(*arguments, first)
        records.write_json(job.folder / "results.json", {"model": first})
        assert [job.model for job in jobs(*arguments, f"{tmp_path}/second/../first/tuned")] == [first]
        with pytest.raises(ValueError, match=f"out/tuned holds the results of {first}: give {second} its own --output"):
            jobs(*arguments, second)


RESULT = {"metrics": {"exact_match": 0.5}, "samples": 8, "visual_tokens": None}


class TestRecords:
    def test_a_result_counts_for_the_settings_it_was_made_with(self, tmp_path):
        records.write_json(tmp_path / "tasks" / "gqa" / "result.json", {**RESULT, "identity": {"limit": 8}})
        assert records.finished(tmp_path, "gqa", {"limit": 8})
        assert records.finished(tmp_path, "gqa", {"limit": 9}) is None

    def test_with_all_metrics_serves_where_the_table_s_are_asked_for(self, tmp_path):
        captions = tmp_path / "tasks" / "mini_nocaps_val" / "result.json"
        records.write_json(captions, {**RESULT, "identity": {"limit": 8, "metrics": "all"}})
        assert records.finished(tmp_path, "mini_nocaps_val", {"limit": 8, "metrics": "table"})
        records.write_json(captions, {**RESULT, "identity": {"limit": 8, "metrics": "table"}})
        assert records.finished(tmp_path, "mini_nocaps_val", {"limit": 8, "metrics": "all"}) is None
