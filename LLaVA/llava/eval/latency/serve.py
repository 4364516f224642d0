"""``serve``: requests per second and time to the first token of a served model, unpruned and pruned.

The requests are those of vLLM's own ``vllm bench serve``, each with an image of its own. One server answers both: a
request states its ratio. KV blocks are read from the server's ``/metrics`` while it answers.
"""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from PIL import Image
from tqdm import tqdm

from llava.adapters.vllm.switch import RATIO
from llava.command import EMBEDDED
from llava.eval.latency.models import UNPRUNED
from llava.eval.latency.suite import environ_with
from llava.hf import path_of
from llava.pruning import PruningConfig

RANDOM = "random"
DECODER = {"hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 12, "head_dim": 64}
DECODER |= {"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048}
"""152 M parameters: as much as a CPU reads in a tenth of a second, and enough for the prompt's length to count."""
START_SECONDS, STOP_SECONDS = 1800, 60
LOOK_SECONDS = 0.2
"""Between two readings of the KV cache."""


@dataclass(frozen=True)
class Load:
    """What a server is asked: so many requests per measurement, each with an image (width, height), in turns.

    ``concurrency`` are the numbers of requests at once; a measurement has at least as many requests.
    """

    concurrency: Sequence[int]
    requests: int
    repetitions: int
    width: int
    height: int
    new_tokens: int


def measure(url: str, vllm: str, method: str, ratio: float, load: Load) -> list[dict[str, Any]]:
    """Ask a running server, unpruned and pruned in turns.

    ``url`` is an OpenAI-compatible server with this package's plug-in, which trusts the ratios of requests and prunes
    with ``method``; ``vllm`` is the program whose ``bench serve`` sends the requests; ``ratio`` is compared with 1.

    Returns
    -------
    list of dict
        One per number of requests at once and ratio, medians over the repetitions: "method", "ratio", "concurrency",
        "requests", "requests_per_second", "ttft_ms" ("p50" and "p95"), "prompt_tokens", "kv_blocks" (the peak; None
        where the server does not state it) and "times_unpruned", the ratio of requests per second.

    Raises
    ------
    OSError
        If the server or the program fails.
    ValueError
        If the server does not prune.
    """
    model = _served_model(url)
    ratios = {UNPRUNED: 1.0, method: ratio}
    counts = [_prompt_tokens(url, model["id"], load, kept) for kept in ratios.values()]  # also warms up
    if ratio < 1 and counts[0] <= counts[1]:
        raise ValueError(
            f"the server at {url} takes {counts[1]} tokens for a prompt with the ratio {ratio}, and {counts[0]} "
            "without pruning: start it with BASELINE and SUBSET_RATIO set, and with --trust-request-mm-kwargs"
        )
    rounds: dict[tuple[int, str], list[dict[str, Any]]] = {}
    seed = time.time_ns() % 2**31  # a server that was measured before has its images in its caches
    with tqdm(total=len(load.concurrency) * load.repetitions * len(ratios), desc="serve", leave=False) as bar:
        for at_once in load.concurrency:
            for _ in range(load.repetitions):
                for name, kept in ratios.items():
                    found = bench(url, vllm, model, load, at_once, kept, seed := seed + 1)
                    rounds.setdefault((at_once, name), []).append(found)
                    bar.update()
    return [
        _row(name, ratios[name], at_once, found, rounds[at_once, UNPRUNED]) for (at_once, name), found in rounds.items()
    ]


def _row(
    name: str, ratio: float, at_once: int, found: Sequence[dict[str, Any]], unpruned: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    def median(key: str) -> float:
        return statistics.median(one[key] for one in found)

    blocks = [one["kv_blocks"] for one in found if one["kv_blocks"] is not None]
    times = [own["request_throughput"] / one["request_throughput"] for own, one in zip(found, unpruned, strict=True)]
    return {
        "method": name,
        "ratio": ratio,
        "concurrency": at_once,
        "requests": sum(one["completed"] for one in found),
        "requests_per_second": median("request_throughput"),
        "ttft_ms": {name: median(f"{name}_ttft_ms") for name in ("p50", "p95")},
        "prompt_tokens": statistics.median(one["total_input_tokens"] / one["completed"] for one in found),
        "kv_blocks": max(blocks, default=None),
        "times_unpruned": statistics.median(times),
    }


def bench(
    url: str, vllm: str, model: Mapping[str, Any], load: Load, at_once: int, ratio: float, seed: int
) -> dict[str, Any]:
    """One run of ``vllm bench serve``: what it writes, and "kv_blocks"."""
    count = max(load.requests, at_once)
    with tempfile.TemporaryDirectory() as folder, _watched_cache(url) as most:
        file = Path(folder) / "result.json"
        command = [vllm, "bench", "serve", "--backend", "openai-chat", "--base-url", url]
        command += ["--endpoint", "/v1/chat/completions", "--model", model.get("root") or model["id"]]
        command += ["--served-model-name", model["id"], "--dataset-name", "random-mm", "--seed", str(seed)]
        command += ["--random-mm-base-items-per-request", "1"]
        command += ["--random-mm-limit-mm-per-prompt", json.dumps({"image": 1, "video": 0})]
        command += ["--random-mm-bucket-config", f"{{({load.height}, {load.width}, 1): 1.0}}"]
        command += ["--random-input-len", "16", "--random-output-len", str(load.new_tokens), "--ignore-eos"]
        command += ["--num-prompts", str(count), "--max-concurrency", str(at_once)]
        command += ["--percentile-metrics", "ttft", "--metric-percentiles", "50,95", "--disable-tqdm"]
        command += ["--extra-body", json.dumps({"mm_processor_kwargs": {RATIO: ratio}})]
        command += ["--save-result", "--result-dir", folder, "--result-filename", file.name]
        with _program_exists(vllm):
            done = subprocess.run(command, env=environ_with({}), capture_output=True, text=True, check=False)
        if done.returncode or not file.exists():
            raise OSError(f"vllm bench serve ended with status {done.returncode}: {_reason(done.stderr)}")
        found = json.loads(file.read_text(encoding="utf-8"))
    if found["completed"] < count:
        raise OSError(f"{count - found['completed']} of {count} requests failed, {at_once} at once with ratio {ratio}")
    return found | {"kv_blocks": max(most, default=None)}


@contextmanager
def _watched_cache(url: str) -> Iterator[list[int]]:
    """Yields a list to which the number of KV blocks in use is added as long as the block runs."""
    used: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            try:
                blocks = kv_blocks(_get(url, "/metrics").text)
            except OSError:
                return  # a server of another kind
            if blocks is not None:
                used.append(blocks)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield used
    finally:
        over.set()
        thread.join()


def kv_blocks(metrics: str) -> int | None:
    """KV blocks in use by vLLM's metrics, in Prometheus's text format; None if they are not stated."""
    shares = re.findall(r"^vllm:kv_cache_usage_perc(?:{.*})? (\S+)$", metrics, re.MULTILINE)
    totals = re.findall(r'^vllm:cache_config_info{.*num_gpu_blocks="(\d+)".*$', metrics, re.MULTILINE)
    if not shares or len(shares) != len(totals):
        return None
    return sum(round(float(share) * int(total)) for share, total in zip(shares, totals, strict=True))


def _get(url: str, path: str) -> requests.Response:
    answer = requests.get(url + path, timeout=30)
    answer.raise_for_status()
    return answer


def _served_model(url: str) -> dict[str, Any]:
    """Its "id", and "root", where its tokenizer is."""
    try:
        return _get(url, "/v1/models").json()["data"][0]
    except requests.ConnectionError:
        raise OSError(f"no server answers at {url}") from None
    except (requests.RequestException, KeyError, IndexError, TypeError) as error:
        raise OSError(f"{url} is no OpenAI-compatible server: {error} (/v1/models)") from None


def _prompt_tokens(url: str, model: str, load: Load, ratio: float) -> int:
    """How many tokens a prompt with one image takes."""
    file = io.BytesIO()
    Image.effect_noise((load.width, load.height), 100).convert("RGB").save(file, "PNG")
    picture = {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
    content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": "What is in the image?"}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": load.new_tokens}
    body |= {"mm_processor_kwargs": {RATIO: ratio}}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    if not answer.ok:
        raise OSError(f"{url} answers {answer.status_code}: {_reason(answer.text)}")
    return answer.json()["usage"]["prompt_tokens"]


@contextmanager
def started(vllm: str, model: str, config: PruningConfig, options: Sequence[str], log: Path) -> Iterator[str]:
    """Yields the address of a server of ``model`` that prunes with ``config``; its output goes to ``log``.

    If it does not start, it is an `OSError`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as output:
        command = [vllm, "serve", _folder_of(model, Path(folder)), "--host", "127.0.0.1", "--port", port]
        command += ["--trust-request-mm-kwargs", *options]
        env = environ_with(config.to_env())
        with _program_exists(vllm):
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _program_exists(vllm: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise OSError(f"{vllm} is not there: pip install vllm, or name the program with --vllm") from None


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            _get(url, "/health")
            return
        except OSError:
            time.sleep(1)
        if process.poll() is not None:
            reason = _reason(log.read_text(encoding="utf-8", errors="replace"))
            raise OSError(f"vllm serve ended with status {process.returncode}: {reason} (see {log})")
    raise OSError(f"vllm serve did not answer within {START_SECONDS} seconds (see {log})")


def _reason(output: str) -> str:
    """The first error of a program's output, or its last line."""
    errors = re.findall(r"(?:^|\s)(\w*Error: .*)$", output, re.MULTILINE)
    return (errors or output.strip().splitlines()[-1:] or ["nothing was printed"])[0].strip()


def _folder_of(model: str, folder: Path) -> str:
    """What vLLM loads: llava-mini, and a random decoder after its tower, are written first."""
    if model not in (EMBEDDED, RANDOM):
        return path_of(model)
    from llava.serve.export_hf import export, published_name

    export(EMBEDDED, folder / EMBEDDED)
    if model == EMBEDDED:
        return str(folder / EMBEDDED)
    from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_pretrained(folder / EMBEDDED)
    config.text_config.update(DECODER)
    made = LlavaForConditionalGeneration(config)
    weights = {published_name(name): value for name, value in made.state_dict().items()}
    made.save_pretrained(folder / RANDOM, state_dict=weights, save_original_format=False)
    AutoProcessor.from_pretrained(folder / EMBEDDED).save_pretrained(folder / RANDOM)
    return str(folder / RANDOM)


def program() -> str:
    """The ``vllm`` of this environment, or the one on the path."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.exists() else "vllm"
