"""The measurements: what they run, what they report, what they refuse. No time is asserted."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.adapters.transformers import active_session
from llava.eval.latency import clock, pope, prefill, select, suite
from llava.eval.latency.__main__ import main
from llava.eval.latency.models import load, prompts, read_methods
from llava.pruning import PruningConfig, available_methods, kept_count, own_budget
from tiny_vlms import can_be_pruned
from tiny_vlms import tiny as tiny_vlm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", CPU, torch.float32, "sdpa")


class TestClock:
    def test_variants_take_turns_behind_a_warm_up(self):
        calls = []
        runs = {name: lambda watch, name=name: calls.append(name) for name in "ab"}
        times = clock.take_turns(runs, repetitions=3, device=CPU, warm_up=1)
        assert calls == ["a", "b"] * 4
        assert [len(rounds) for rounds in times.values()] == [3, 3]

    def test_the_median_the_tail_and_a_part_that_is_not_always_there(self):
        rounds = [{"total": float(i)} for i in range(101)]
        rounds[0]["vision"] = 7.0
        assert clock.summarise(rounds) == {
            "total": {"median": 50.0, "p95": 95.0, "worst": 100.0},
            "vision": {"median": 0.0, "p95": 0.0, "worst": 7.0},
        }

    def test_a_part_that_runs_twice_is_added_up(self, monkeypatch):
        moments = iter([0.0, 1.0, 5.0, 7.0])
        monkeypatch.setattr(clock.time, "perf_counter", lambda: next(moments))
        watch = clock.Stopwatch(CPU)
        for _ in range(2):
            with watch.part("vision"):
                pass
        assert watch.milliseconds() == {"vision": 3000.0}


class TestSelect:
    def test_every_size_is_compared_with_the_published_algorithm(self):
        sizes = [select.Size(20, 3, 1), select.Size(12, 2, 4)]
        rows = select.measure(sizes, ["dpp"], width=8, repetitions=2, device=CPU, dtype=torch.float16)
        assert [(row["method"], row["n"], row["k"], row["batch"]) for row in rows] == [
            (method, *size) for size in ((20, 3, 1), (12, 2, 4)) for method in ("published", "dpp")
        ]
        assert all(row["times_published"] == 1 for row in rows if row["method"] == "published")
        assert all(row["of_divprune"] is None for row in rows)

    def test_every_method_is_timed_with_what_it_reads_made_up(self):
        settings = {"width": 8, "repetitions": 1, "device": CPU, "dtype": torch.float16}
        rows = select.measure([select.Size(36, 5, 2)], ["all"], **settings)
        measured = [row["method"] for row in rows]
        assert measured == ["published", *sorted(available_methods().keys() - set(select.NOTHING_TO_TIME))]
        assert [row["of_divprune"] for row in rows if row["method"] == "divprune"] == [1]

    @pytest.mark.parametrize("text", ["576", "56:576", "576:0", "576:56x0", "a:b"])
    def test_a_size_that_is_none_is_refused(self, text):
        with pytest.raises(ValueError, match=f"not '{text}'"):
            select.Size.read(text)

    def test_a_curve_changes_one_thing_at_a_time(self):
        points = select.curve([select.Size(576, 56, 1)])
        assert {size.batch for size in points["N"]} == {1} and len({size.n for size in points["N"]}) == 5
        assert {size.n for size in points["k"]} == {576} and {size.k for size in points["batch"]} == {56}


class TestModels:
    def test_prompts_about_an_image_share_it(self, tiny):
        asked = prompts(tiny, images=[3, 3, 4], questions=[0, 1, 1])
        first, second, third = asked["images"]
        assert torch.equal(first, second) and not torch.equal(second, third)
        assert not torch.equal(asked["input_ids"][0], asked["input_ids"][1])
        assert torch.equal(asked["input_ids"][1], asked["input_ids"][2])
        assert int((asked["input_ids"][0] > 0).sum()) == 60


class TestPrefill:
    def test_parts_add_up_and_kept_tokens_save_keys_and_values(self, tiny):
        configs = read_methods(["otprune", "published", "fastv@2", "visionzip"], 0.25)
        rows = prefill.measure(tiny, configs, batch=2, new_tokens=3, repetitions=2)
        unpruned, otprune, published, fastv, _ = rows
        assert [row["method"] for row in rows] == ["unpruned", *configs]
        # 4 layers of keys and values of 64 numbers, 4 bytes each
        assert unpruned["kv_bytes"] == 2 * 2 * 4 * 64 * 4 * (60 + 64)
        assert otprune["kv_bytes"] == published["kv_bytes"] == 2 * 2 * 4 * 64 * 4 * (60 + kept_count(64, 0.25))
        assert (otprune["visual_tokens"], fastv["visual_tokens"]) == (16, 40)
        assert unpruned["ttft_ratio"] == 1 and unpruned["selection_share"] == 0
        for row in rows[1:]:
            assert 0 < row["selection_share"] < 1 and row["ms"]["decoding"]["median"] > 0
        assert tiny.pruning is None

    def test_switching_the_method_is_not_measured(self, tiny, monkeypatch):
        seconds = itertools.count()  # every look at the clock takes one
        monkeypatch.setattr(clock.time, "perf_counter", lambda: next(seconds))
        switch = tiny.set_pruning

        def switch_slowly(config):
            switch(config)
            for _ in range(1000):
                next(seconds)

        monkeypatch.setattr(tiny, "set_pruning", switch_slowly)
        for row in prefill.measure(tiny, read_methods(["otprune"], 0.25), batch=1, new_tokens=1, repetitions=2):
            assert row["ms"]["total"]["worst"] < 1e3 * 100

    def test_what_an_images_own_budget_takes_is_selection(self, tiny, monkeypatch):
        seconds = itertools.count()  # every look at the clock takes one
        monkeypatch.setattr(clock.time, "perf_counter", lambda: next(seconds))

        def found_slowly(features):
            return float(len(list(itertools.islice(seconds, 1000))))

        monkeypatch.setattr(own_budget, "effective_rank", found_slowly)
        configs = read_methods(["otprune:budget=effective_rank:reference_rank=1000"], 0.25)
        _, row = prefill.measure(tiny, configs, batch=1, new_tokens=1, repetitions=1)
        assert row["visual_tokens"] == 16 and row["ms"]["selection"]["median"] >= 1e3 * 1000


@can_be_pruned
class TestModelsOfTransformers:
    @pytest.mark.parametrize("new_tokens", [1, 3])
    def test_they_are_measured_as_ours(self, new_tokens):
        model = tiny_vlm("qwen2_5_vl").model
        configs = read_methods(["otprune", "fastv@2"], 0.25)
        rows = prefill.measure(model, configs, batch=2, new_tokens=new_tokens, repetitions=1)
        unpruned, otprune, _ = rows
        # 4 layers of keys and values of 2 heads of 8 numbers, 4 bytes each
        assert unpruned["kv_bytes"] == 2 * 2 * 4 * 16 * 4 * (60 + 576)
        assert otprune["kv_bytes"] == 2 * 2 * 4 * 16 * 4 * (60 + 144)
        assert [row["visual_tokens"] for row in rows] == [576, 144, (576 + 144) / 2]
        for row in rows:
            assert row["ms"]["vision"]["median"] > 0
            assert (row["ms"]["selection"]["median"] > 0) == (row is not unpruned)
        assert active_session(model) is None

    def test_a_folder_is_measured(self, tmp_path, capsys):
        tiny_vlm("gemma3").model.save_pretrained(tmp_path / "model")
        command = ["prefill", "--model", str(tmp_path / "model"), "--method", "otprune", "--ratio", "0.25"]
        command += ["--batch", "1", "--repetitions", "1", "--device", "cpu", "--output", str(tmp_path)]
        assert main(command) == 0
        assert [row["visual_tokens"] for row in json.loads((tmp_path / "prefill.json").read_text())["rows"]] == [16, 4]

    def test_many_questions_are_answered_without_a_cache(self):
        model = tiny_vlm("qwen2_5_vl").model
        settings = {"images": 2, "questions": 2, "batches": [2], "cache_bytes": 10**7}
        rows = pope.measure(model, read_methods(["otprune"], 0.25), **settings)
        assert [(row["method"], row["batch"], row["cached"], row["hits"], row["misses"]) for row in rows] == [
            (method, batch, False, 0, 4) for method in ("unpruned", "otprune") for batch in (1, 2)
        ]
        assert all(row["same_answers"] == 1 for row in rows)
        assert active_session(model) is None and not hasattr(model, "visual_cache")


def test_a_run_of_many_questions_answers_alike_in_every_setting(tiny):
    settings = {"images": 3, "questions": 2, "batches": [4], "cache_bytes": 10**7, "images_one_by_one": 1}
    rows = pope.measure(tiny, read_methods(["otprune"], 0.25), **settings)
    assert [(row["method"], row["batch"], row["cached"], row["samples"], row["hits"]) for row in rows] == [
        (method, *setting)
        for method in ("unpruned", "otprune")
        for setting in ((1, False, 2, 0), (1, True, 2, 1), (4, False, 6, 0), (4, True, 6, 3))
    ]
    assert all(row["same_answers"] == 1 and row["hits"] + row["misses"] == row["samples"] for row in rows)
    assert rows[0]["times_plain"] == rows[4]["times_plain"] == rows[0]["times_unpruned"] == 1
    assert tiny.visual_cache is None


SWITCH = ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX", "OTPRUNE_", "FASTV_")


class TestSuite:
    @pytest.fixture
    def runs(self, monkeypatch):
        """lmms-eval, played: the commands and switches that it was started with; every run is faster than the last."""
        started = []

        def run(command, env, **_):
            started.append((command, {name: value for name, value in env.items() if name.startswith(SWITCH)}))
            folder = Path(command[command.index("--output_path") + 1], "model")
            folder.mkdir(parents=True)
            throughput = {"avg_latency": 1 / len(started), "avg_visual_cache_hits": 3.0}
            (folder / "20260101_results.json").write_text(json.dumps({"throughput": throughput}))
            return SimpleNamespace(returncode=0, stdout="")

        monkeypatch.setattr(suite.subprocess, "run", run)
        monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(suite, "task_folders", lambda: ["tasks"])
        monkeypatch.setenv("BASELINE", "RANDOM")
        return started

    def measure(self, folder, **settings):
        usual = {"methods": ["otprune"], "ratio": 0.2, "batches": [8], "tasks": ["mini_pope"], "limit": 4}
        usual |= {"device": "cpu", "folder": folder}
        return suite.measure("llava-mini", **{**usual, **settings})

    def test_every_setting_is_a_run_beside_batches_of_1_without_a_cache(self, runs, tmp_path):
        rows = self.measure(tmp_path)
        settings = [(1, False), (1, True), (8, False), (8, True)]
        assert [(row["method"], row["batch"], row["cached"]) for row in rows] == [
            (method, *setting) for method in ("unpruned", "otprune") for setting in settings
        ]
        assert [round(row["times_unpruned"], 3) for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert [round(row["times_plain"], 3) for row in rows[4:]] == [1, 1.2, 1.4, 1.6]
        assert [switch for _, switch in runs] == [{"BASELINE": "ORIG"}] * 4 + [
            {"BASELINE": "OTPRUNE", "SUBSET_RATIO": "0.2", "LAYER_INDEX": "0"}
        ] * 4
        assert "pretrained=llava-mini,device=cpu,visual_cache=off" in runs[0][0]
        assert runs[3][0][-4:] == ["--output_path", str(tmp_path / "unpruned_batch8_cache"), "--limit", "4"]

    def test_a_method_is_switched_on_as_the_other_commands_read_it(self, runs, tmp_path):
        self.measure(tmp_path, methods=["published", "fastv@3"])
        switches = [switch for _, switch in runs]
        otprune = {"BASELINE": "OTPRUNE", "SUBSET_RATIO": "0.2", "LAYER_INDEX": "0"}
        assert switches[4] == otprune | {"OTPRUNE_COMPAT": "1"}
        assert switches[8] == {"BASELINE": "FASTV", "SUBSET_RATIO": "0.2", "LAYER_INDEX": "3"}
        assert PruningConfig.from_env(switches[4]).build_pruner().compat

    def test_models_of_transformers_say_why_not(self, tmp_path, capsys):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}}))
        command = ["suite", "--model", str(tmp_path), "--device", "cpu", "--output", str(tmp_path / "out")]
        assert main(command) == 2
        assert "suite compares batch sizes and a cache" in capsys.readouterr().err

    def test_a_run_that_fails_says_why(self, runs, tmp_path, monkeypatch):
        failed = SimpleNamespace(returncode=3, stdout="so far so good\nno such task\n")
        monkeypatch.setattr(suite.subprocess, "run", lambda *_, **__: failed)
        with pytest.raises(OSError, match="unpruned_batch1_no_cache: lmms-eval ended with status 3: no such task"):
            self.measure(tmp_path)


class TestCommandLine:
    def test_select_writes_tables_and_a_curve(self, tmp_path, capsys):
        command = ["select", "--sizes", "16:4", "--width", "8", "--repetitions", "1", "--curve", "--device", "cpu"]
        assert main([*command, "--output", str(tmp_path)]) == 0
        report = json.loads((tmp_path / "select.json").read_text())
        assert report["settings"]["command"].startswith("python -m llava.eval.latency select --sizes 16:4")
        assert {"name", "torch", "threads"} == set(report["machine"])
        table = (tmp_path / "select.md").read_text()
        assert table.strip() in capsys.readouterr().out
        assert "| ms on this machine |" in table and "| not measured |" in table
        rows = list(csv.DictReader((tmp_path / "select_curve.csv").open()))
        assert {row["axis"] for row in rows} == {"N", "k", "batch"}

    def test_generate_runs_on_the_tiny_shape(self, tmp_path, capsys):
        command = ["generate", "--batch", "2", "--new-tokens", "2", "--repetitions", "1", "--pope", "2x2"]
        assert main([*command, "--device", "cpu", "--output", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "| TTFT / unpruned |" in printed and "2 images, 2 questions each:" in printed

    def test_a_finished_measurement_stays(self, tmp_path, capsys):
        command = ["select", "--sizes", "9:2", "--width", "4", "--repetitions", "1", "--output", str(tmp_path)]
        assert main(command) == 0
        before = (tmp_path / "select.json").read_bytes()
        assert main(command) == 2
        assert "is a finished measurement" in capsys.readouterr().err
        assert (tmp_path / "select.json").read_bytes() == before
        assert main([*command, "--force"]) == 0
