"""``llava.eval.latency serve``: what it asks, reads and refuses, against a server and a ``vllm`` that are played."""

from __future__ import annotations

import json

import pytest

import fake_vllm
from llava.eval.latency import serve
from llava.eval.latency.__main__ import main


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command, and what it wrote."""
    monkeypatch.setattr(serve, "LOOK_SECONDS", 0.01)
    monkeypatch.setenv("BASELINE", "RANDOM")
    program = fake_vllm.program(tmp_path)

    def run(*arguments: str) -> dict:
        command = ["serve", "--vllm", program, "--output", str(tmp_path), "--repetitions", "1", "--requests", "2"]
        assert main([*command, *arguments]) == 0
        return json.loads((tmp_path / "serve.json").read_text())

    return run


def test_a_running_server_is_asked_in_turns_at_every_number_of_requests_at_once(run, capsys):
    with fake_vllm.running() as url:
        report = run("--url", url, "--concurrency", "1", "4", "--ratio", "0.25", "--method", "divprune")
    rows = report["rows"]
    assert [(row["method"], row["concurrency"], row["requests"]) for row in rows] == [
        ("unpruned", 1, 2),
        ("divprune", 1, 2),
        ("unpruned", 4, 4),
        ("divprune", 4, 4),
    ]
    assert [row["times_unpruned"] for row in rows] == [1, 2, 1, 2]
    assert [row["prompt_tokens"] for row in rows] == [576, 144, 576, 144]
    assert [row["ttft_ms"] for row in rows[:2]] == [{"p50": 400, "p95": 800}, {"p50": 200, "p95": 400}]
    assert {row["kv_blocks"] for row in rows} == {4}
    assert "| divprune | 25 % | 4 | 2.00 | 20 | 200 / 400 | 144 | 4 |" in capsys.readouterr().out


def test_every_measurement_has_images_of_its_own(run, monkeypatch):
    seeds, bench = [], serve.bench
    monkeypatch.setattr(serve, "bench", lambda *given: (seeds.append(given[-1]), bench(*given))[1])
    with fake_vllm.running() as url:
        run("--url", url, "--concurrency", "1", "2", "--repetitions", "2")
    assert len(set(seeds)) == 8


def test_a_server_is_started_with_each_method_and_stopped(run, tmp_path):
    options = ["--", "--dtype", "float32"]
    rows = run("--model", "folder", "--method", "otprune:gamma=0.5,divprune", "--concurrency", "1", *options)["rows"]
    assert [row["method"] for row in rows] == ["unpruned", "otprune:gamma=0.5", "unpruned", "divprune"]
    log = (tmp_path / "serve_divprune.log").read_text()
    assert log.startswith("BASELINE DIVPRUNE SUBSET_RATIO 0.098 folder --host 127.0.0.1 --port ")
    assert log.endswith("--trust-request-mm-kwargs --dtype float32\n")


def test_a_server_that_does_not_stop_is_killed(run, monkeypatch):
    monkeypatch.setattr(serve, "STOP_SECONDS", 0.1)
    rows = run("--model", "folder", "--concurrency", "1", "--", "--stubborn")["rows"]
    assert [row["method"] for row in rows] == ["unpruned", "otprune"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--url", "http://127.0.0.1:1"], "no server answers at http://127.0.0.1:1"),
        (["--url", "http://127.0.0.1:1", "--model", "folder"], "--url measures a server that runs"),
        (["--vllm", "/no/vllm", "--method", "divprune,fastv"], "fastv drops tokens inside the decoder"),
        (["--model", "folder", "--", "--break"], "vllm serve ended with status 1: ValueError: there is no such option"),
        (["--model", "folder", "--concurrency", "3"], "1 of 32 requests failed, 3 at once with ratio 1.0"),
        (["--model", "folder", "--vllm", "/no/vllm"], "/no/vllm is not there: pip install vllm"),
        (["--image", "336"], "must be WIDTHxHEIGHT, such as 336x336, not '336'"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(tmp_path, capsys, arguments, sentence):
    command = ["serve", "--vllm", fake_vllm.program(tmp_path), "--output", str(tmp_path)]
    try:
        assert main([*command, *arguments]) == 2
    except SystemExit as error:
        assert error.code == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_server_that_does_not_prune_is_noticed(tmp_path, capsys):
    with fake_vllm.running(prunes=False) as url:
        assert main(["serve", "--url", url, "--vllm", fake_vllm.program(tmp_path), "--output", str(tmp_path)]) == 2
    assert "takes 576 tokens for a prompt with the ratio 0.098, and 576 without pruning" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metrics", "blocks"),
    [
        ("", None),
        ("vllm:kv_cache_usage_perc 0.5\n", None),
        (
            'vllm:kv_cache_usage_perc{engine="0"} 0.5\nvllm:kv_cache_usage_perc{engine="1"} 0.1\n'
            'vllm:cache_config_info{engine="0",num_gpu_blocks="10"} 1.0\n'
            'vllm:cache_config_info{engine="1",num_gpu_blocks="20"} 1.0\n',
            7,
        ),
    ],
)
def test_blocks_in_use_are_those_of_all_engines(metrics, blocks):
    assert serve.kv_blocks(metrics) == blocks
