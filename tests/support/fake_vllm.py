"""A program that behaves as ``vllm serve`` and ``vllm bench serve`` do, as far as they are looked at."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

BLOCKS, TOKENS = 200, 576


def kept(body: dict) -> float:
    return body["mm_processor_kwargs"]["visual_token_ratio"]


class Server(BaseHTTPRequestHandler):
    """Prunes if it is told to, with 2 % of its KV cache in use."""

    prunes = True

    def do_GET(self):
        self.answer(
            {
                "/health": "",
                "/v1/models": json.dumps({"data": [{"id": "tiny", "root": "folder/of/tiny"}]}),
                "/metrics": f'vllm:cache_config_info{{engine="0",num_gpu_blocks="{BLOCKS}"}} 1.0\n'
                '# HELP vllm:kv_cache_usage_perc used\nvllm:kv_cache_usage_perc{engine="0"} 0.02\n',
            }.get(self.path)
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = round(TOKENS * kept(body)) if self.prunes else TOKENS
        self.answer(json.dumps({"usage": {"prompt_tokens": count}}))

    def answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_):
        pass


@contextmanager
def running(prunes: bool = True):
    """A server of this process; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Server,), {"prunes": prunes}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def serve(options: list[str]) -> None:
    print("BASELINE", os.environ.get("BASELINE"), "SUBSET_RATIO", os.environ.get("SUBSET_RATIO"), *options, flush=True)
    if "--break" in options:
        raise ValueError("there is no such option")
    if "--stubborn" in options:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ThreadingHTTPServer(("127.0.0.1", int(options[options.index("--port") + 1])), Server).serve_forever()


def bench(options: list[str]) -> None:
    """Pruned requests are twice as fast; at 3 at once, one fails."""
    given = dict(pairwise(options))
    count, at_once = int(given["--num-prompts"]), int(given["--max-concurrency"])
    ratio = kept(json.loads(given["--extra-body"]))
    seconds = 0.2 if ratio < 1 else 0.4
    found = {
        "completed": count - (at_once == 3),
        "request_throughput": at_once / seconds,
        "total_input_tokens": count * round(TOKENS * ratio),
        "p50_ttft_ms": 1000 * seconds,
        "p95_ttft_ms": 2000 * seconds,
        "command": options,
    }
    Path(given["--result-dir"], given["--result-filename"]).write_text(json.dumps(found))


def program(folder: Path) -> str:
    """A file that runs this module."""
    file = folder / "vllm"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    file.chmod(0o755)
    return str(file)


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    serve(rest) if command == "serve" else bench(rest[1:])
