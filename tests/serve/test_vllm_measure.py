"""``llava.eval.latency serve`` starts a real server, and vLLM's own benchmark asks it."""

from __future__ import annotations

import json

from llava.eval.latency.__main__ import main
from tiny_served import checkpoint

ENVIRON = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ENVIRON |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1"}


def test_a_server_is_measured_unpruned_beside_pruned(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)  # of engines of this process
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    folder = checkpoint("llava", tmp_path / "tiny")
    command = ["serve", "--model", str(folder), "--method", "visionzip", "--ratio", "0.25", "--output", str(tmp_path)]
    command += ["--concurrency", "2", "--requests", "8", "--repetitions", "1", "--image", "56x56", "--new-tokens", "64"]
    command += ["--", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "2"]
    assert main(command) == 0
    rows = json.loads((tmp_path / "serve.json").read_text())["rows"]
    assert [(row["method"], row["requests"]) for row in rows] == [("unpruned", 8), ("visionzip", 8)]
    assert all(row["kv_blocks"] and row["requests_per_second"] > 0 and row["ttft_ms"]["p95"] > 0 for row in rows)
