"""``vllm serve`` on two processes of tensor parallelism, configured by ``--hf-overrides`` alone."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from images_to_serve import CONVERSATIONS, IMAGES
from served import NEW, Reference
from tiny_served import checkpoint

PRUNING = {"method": "otprune", "ratio": 0.25, "options": {"gamma": 0.05}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, folder, file of the log)"""
    folder = checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("tiny") / "qwen2_5_vl")
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(folder, PRUNING, log) as address:
        yield address, folder, log


@contextmanager
def serving(folder, pruning, log):
    """A server of two ranks; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    switch = ("BASELINE", "SUBSET_RATIO", "OTPRUNE_", "VLLM_ENABLE_V1")  # what other engines of this process read
    environ = {name: value for name, value in os.environ.items() if not name.startswith(switch)}
    environ |= {"VLLM_PLUGINS": "otprune", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environ |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environ |= {"VLLM_LOGGING_LEVEL": "INFO"}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "4", "--block-size", "32", "--tensor-parallel-size", "2"]
    command += ["--limit-mm-per-prompt", '{"image": 2}', "--trust-request-mm-kwargs"]
    command += ["--hf-overrides", json.dumps({"visual_token_pruning": pruning})]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environ, stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 1500
        while not is_up(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def is_up(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def ask(address: str, content: list, **more) -> tuple[int, dict]:
    """(status, answer) of one chat."""
    body = {"model": "tiny", "temperature": 0, "max_tokens": NEW, "ignore_eos": True, "return_token_ids": True}
    body |= {"messages": [{"role": "user", "content": content}]} | more
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def content_of(images, question) -> list:
    parts = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": address}})
    return [*parts, {"type": "text", "text": question}]


@pytest.mark.parametrize("ratio", [None, 0.5, 1.0])
def test_two_ranks_answer_as_transformers(server, ratio):
    address, folder, _ = server
    expected = Reference(folder).ask(CONVERSATIONS, "otprune", 0.25 if ratio is None else ratio, gamma=0.05)
    own = {} if ratio is None else {"mm_processor_kwargs": {"visual_token_ratio": ratio}}
    for conversation, wanted in zip(CONVERSATIONS, expected, strict=True):
        status, found = ask(address, content_of(*conversation), **own)
        assert status == 200
        assert found["usage"]["prompt_tokens"] == wanted.prompt
        assert found["choices"][0]["token_ids"] == wanted.tokens


@pytest.mark.parametrize("ratio", [0, 2.0, -0.5, "half", None, True])
def test_a_wrong_ratio_is_a_bad_request_in_one_sentence(server, ratio):
    content = content_of(IMAGES[:1], "What?")
    status, found = ask(server[0], content, mm_processor_kwargs={"visual_token_ratio": ratio})
    assert status == 400
    assert f"visual_token_ratio must be a number with 0 < r <= 1, not {ratio!r}" in found["error"]["message"]
    assert ask(server[0], content)[0] == 200


def test_a_video_is_a_bad_request_in_one_sentence(server):
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    status, found = ask(server[0], [video, {"type": "text", "text": "What?"}])
    assert status == 400 and "videos are not served while images are pruned" in found["error"]["message"]


def test_the_log_says_that_pruning_is_on(server):
    lines = [line for line in server[2].read_text().splitlines() if "otprune keeps" in line]
    assert len(lines) == 1  # of two ranks
    assert "otprune keeps 25 % of the visual tokens before the decoder (gamma=0.05" in lines[0]
    assert lines[0].endswith("of the largest image 9 of 36")


def test_the_encoders_heads_may_be_on_two_ranks(tmp_path):
    """VisionZip ranks by the attention of [CLS] and merges by keys, both of all heads."""
    folder = checkpoint("llava_next", tmp_path / "llava_next")
    expected = Reference(folder).ask(CONVERSATIONS, "visionzip", 0.25)
    with serving(folder, {"method": "visionzip", "ratio": 0.25}, tmp_path / "server.log") as address:
        found = [ask(address, content_of(*conversation))[1] for conversation in CONVERSATIONS]
    assert [one["usage"]["prompt_tokens"] for one in found] == [wanted.prompt for wanted in expected]
    assert [one["choices"][0]["token_ids"] for one in found] == [wanted.tokens for wanted in expected]
