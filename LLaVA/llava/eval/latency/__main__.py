"""The command line: ``python -m llava.eval.latency select|prefill|generate|suite|serve``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from llava.adapters.vllm.switch import check_servable
from llava.command import EMBEDDED, Parser, find_device, positive
from llava.eval.latency import pope, prefill, select, serve, suite
from llava.eval.latency.models import RANDOM, load, read_methods
from llava.eval.latency.report import NOT_MEASURED, Report, mebibytes, table
from llava.flops.made_up import PUBLISHED

DTYPES = ("float32", "float16", "bfloat16")
MEDIAN_AND_WORST = "{{{0}[median]:.3g}} / {{{0}[worst]:.3g}}"
"""The format of a row's cell, by where the row has both."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    command = shlex.join(["python", "-m", "llava.eval.latency", *(sys.argv[1:] if argv is None else argv)])
    return _parser().run(lambda arguments: _measure(arguments, command), argv)


def _measure(arguments: argparse.Namespace, command: str) -> None:
    """Measure, write, print."""
    if getattr(arguments, "pope_one_by_one", None) and not arguments.pope:
        raise ValueError("--pope-one-by-one is for the run that --pope asks for")
    arguments.device = torch.device(find_device(getattr(arguments, "device", None)))
    arguments.method = [name for text in arguments.method for name in text.split(",")]
    dtype = getattr(arguments, "dtype", None) or ("float16" if arguments.device.type == "cuda" else "float32")
    settings = {
        **{name: value for name, value in vars(arguments).items() if isinstance(value, (int, float, str, list))},
        "command": command,
        "device": str(arguments.device),
        "dtype": dtype,
    }
    arguments.dtype = getattr(torch, dtype)
    report = Report(arguments.output, arguments.command, arguments.force)
    rows, text = COMMANDS[arguments.command](arguments, report)
    print(report.write(settings, rows, text))


def _select(arguments: argparse.Namespace, report: Report) -> tuple[list[dict[str, Any]], str]:
    sizes = [select.Size.read(text) for text in arguments.sizes] or select.SIZES
    settings = {name: getattr(arguments, name) for name in ("width", "repetitions", "device", "dtype")}
    rows = select.measure(sizes, arguments.method, **settings)
    columns = {
        "method": "{method}",
        "N -> k": "{n} -> {k}",
        "images": "{batch}",
        "times as fast as published": "{times_published:.2f}",
        "times DivPrune's": lambda row: "" if row["of_divprune"] is None else f"{row['of_divprune']:.2f}",
        _ms_column("ms", arguments.device): MEDIAN_AND_WORST.format("ms"),
        "peak MiB": lambda row: mebibytes(row["peak_bytes"]),
    }
    text = table(columns, rows)
    if arguments.curve:
        points = {
            axis: select.measure(along, arguments.method, **settings) for axis, along in select.curve(sizes).items()
        }
        report.write_curve(points)
        rows += [row | {"axis": axis} for axis, along in points.items() for row in along]
    return rows, text


def _prefill(arguments: argparse.Namespace, report: Report) -> tuple[list[dict[str, Any]], str]:
    configs = read_methods(arguments.method, arguments.ratio)
    model = load(arguments.model, arguments.device, arguments.dtype, arguments.attention)
    asks = getattr(arguments, "pope", None)
    new_tokens = 1 if arguments.command == "prefill" else arguments.new_tokens
    rows = []
    for batch in arguments.batch:
        settings = {"batch": batch, "new_tokens": new_tokens, "repetitions": arguments.repetitions}
        rows += prefill.measure(model, configs, **settings)
    parts = [prefill.TTFT, prefill.VISION, prefill.SELECTION, prefill.PREFILL]
    parts += [prefill.DECODING] if new_tokens > 1 else []
    columns = {
        "method": "{method}",
        "batch": "{batch}",
        "visual tokens": "{visual_tokens:.1f}",
        "TTFT / unpruned": "{ttft_ratio:.3f}",
        "total / unpruned": "{total_ratio:.3f}",
        "selection / prefill": lambda row: f"{100 * row['selection_share']:.1f} %",
        **{_ms_column(part, arguments.device): MEDIAN_AND_WORST.format(f"ms[{part}]") for part in parts},
        **({"answers/s": "{samples_per_second:.3g}"} if new_tokens > 1 else {}),
        "KV MiB": lambda row: mebibytes(row["kv_bytes"]),
        "peak MiB": lambda row: mebibytes(row["peak_bytes"]),
    }
    text = table(columns, rows)
    if asks:
        images, questions = asks
        settings = {"images": images, "questions": questions, "batches": arguments.batch}
        settings |= {"cache_bytes": arguments.cache_mib * 2**20, "images_one_by_one": arguments.pope_one_by_one}
        asked = pope.measure(model, configs, **settings)
        text += f"\n\n{images} images, {questions} questions each:\n\n{table(RUN_COLUMNS, asked)}"
        rows += [row | {"run": "pope"} for row in asked]
    return rows, text


def _suite(arguments: argparse.Namespace, report: Report) -> tuple[list[dict[str, Any]], str]:
    settings = {name: getattr(arguments, name) for name in ("ratio", "tasks", "limit")}
    settings |= {"batches": arguments.batch, "device": str(arguments.device), "folder": report.folder / "runs"}
    rows = suite.measure(arguments.model, arguments.method, **settings)
    return rows, table(RUN_COLUMNS, rows)


def _serve(arguments: argparse.Namespace, report: Report) -> tuple[list[dict[str, Any]], str]:
    if arguments.url and (arguments.model or arguments.server_options or len(arguments.method) > 1):
        raise ValueError("--url measures a server that runs, with its own model, options and one method")
    names = ("concurrency", "requests", "repetitions", "new_tokens")
    width, height = arguments.image
    load = serve.Load(**{name: getattr(arguments, name) for name in names}, width=width, height=height)
    report.about = f"medians of {load.repetitions} measurements of {load.requests} requests or more"
    configs = read_methods(arguments.method, arguments.ratio)
    for config in configs.values():
        check_servable(config)
    rows = []
    for name, config in configs.items():
        if arguments.url:
            server = nullcontext(arguments.url.rstrip("/"))
        else:
            log = report.folder / f"serve_{name.replace(':', '_')}.log"
            model = arguments.model or serve.RANDOM
            server = serve.started(arguments.vllm, model, config, arguments.server_options, log)
        with server as url:
            rows += serve.measure(url, arguments.vllm, name, config.ratio, load)
    columns = {
        "method": "{method}",
        "kept": lambda row: f"{100 * row['ratio']:.3g} %",
        "at once": "{concurrency}",
        "requests/s / unpruned": "{times_unpruned:.2f}",
        "requests/s": "{requests_per_second:.3g}",
        "TTFT p50 / p95, ms": "{ttft_ms[p50]:.0f} / {ttft_ms[p95]:.0f}",
        "tokens per prompt": "{prompt_tokens:.0f}",
        "KV blocks": lambda row: NOT_MEASURED if row["kv_blocks"] is None else str(row["kv_blocks"]),
    }
    return rows, table(columns, rows)


COMMANDS = {"select": _select, "prefill": _prefill, "generate": _prefill, "suite": _suite, "serve": _serve}
RUN_COLUMNS = {
    "method": "{method}",
    "batch": "{batch}",
    "cache": lambda row: "on" if row["cached"] else "off",
    "samples/s / its batch-1 run without a cache": "{times_plain:.2f}",
    "samples/s / unpruned batch-1 run without a cache": "{times_unpruned:.2f}",
    "hits": "{hits:.0f}",
    "same answers": lambda row: f"{100 * row['same_answers']:.1f} %" if "same_answers" in row else "",
}
"""Of `pope` and `suite`."""


def _ms_column(part: str, device: torch.device) -> str:
    name = part if part == "ms" else f"{part}, ms"
    return name if device.type == "cuda" else f"{name} on this machine"


def _pair(names: str, example: str) -> Callable[[str], tuple[int, int]]:
    """A reader of two whole numbers >= 1 with an x between them."""

    def read(text: str) -> tuple[int, int]:
        one, _, other = text.partition("x")
        if not (text.isascii() and one.isdecimal() and other.isdecimal() and int(one) and int(other)):
            raise argparse.ArgumentTypeError(f"must be {names}, such as {example}, not {text!r}")
        return int(one), int(other)

    return read


def _parser() -> Parser:
    parser = Parser(
        "llava.eval.latency",
        "Measure selection, prefill, generation and whole runs; all variants take turns in one run.",
        epilog="Compare ratios within one run. Milliseconds of a CPU mean nothing on another one.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, methods: list[str], repetitions: int | None, here: bool = True) -> Parser:
        one = commands.add_parser(name, help=text, description=text, prog=f"{parser.prog} {name}")
        named = "methods with their options, such as fastv:layer=2, or published (OTPrune's published code); default: "
        one.add_argument(
            "--method", "--methods", nargs="+", default=methods, metavar="NAME[,NAME]", help=named + ",".join(methods)
        )
        one.add_output("latency", folder=True, force="replace a finished measurement")
        if here:
            one.add_device()
        if here and repetitions is not None:  # measured in this process
            one.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
        if repetitions is not None:
            one.add_argument("--repetitions", type=positive, default=repetitions, help=f"default: {repetitions}")
        return one

    def for_model(one: Parser, batch: list[int], model: str = "tiny") -> None:
        one.add_model(model, also=f"{', '.join((*RANDOM, *PUBLISHED))} (random weights), ")
        one.add_ratio()
        one.add_argument("--batch", type=positive, nargs="+", default=batch, help=f"batch sizes; default: {batch}")

    attention = {"choices": ("sdpa", "eager", "flash_attention_2"), "default": "sdpa"}

    one = command("select", "the selection alone, beside the published algorithm", select.METHODS, 20)
    one.add_argument("--sizes", nargs="+", default=[], metavar="N:KxB", help="default: 576:56 2880:282 576:56x32")
    one.add_argument("--width", type=positive, default=4096, metavar="D", help="width of the tokens; default: 4096")
    one.add_argument("--curve", action="store_true", help="cost against N, k and batch around the first size: CSV, PNG")

    one = command("prefill", "time to the first token: vision, selection, prefill", ["otprune"], 10)
    for_model(one, [1, 8])
    one.add_argument("--attention", **attention)

    one = command("generate", "prefill and decoding; with --pope a run of many questions", ["otprune"], 5)
    for_model(one, [1, 16])
    one.add_argument("--attention", **attention)
    one.add_argument("--new-tokens", type=positive, default=32, help="default: 32")
    questions = "also answer Q questions about each of I images, such as 500x18"
    one.add_argument("--pope", type=_pair("IMAGESxQUESTIONS", "500x18"), metavar="IxQ", help=questions)
    fewer = (
        "images that its runs of batch 1 are asked about, whose samples per second do not depend on it; default: all"
    )
    one.add_argument("--pope-one-by-one", type=positive, metavar="I", help=fewer)
    one.add_argument("--cache-mib", type=positive, default=256, help="what the cache may hold; default: 256")

    one = command("suite", "embedded benchmarks through lmms-eval", ["otprune"], None)
    for_model(one, [16], "llava-mini")
    one.add_argument("--tasks", nargs="+", default=suite.TASKS, help=f"default: {suite.TASKS}")
    one.add_argument("--limit", type=positive, help="samples per task; default: all")

    one = command("serve", "requests per second of vLLM with the plug-in", ["otprune"], 3, here=False)
    one.add_argument("--url", metavar="ADDRESS", help="a server that runs, with BASELINE and --trust-request-mm-kwargs")
    of = f"what to serve otherwise: folder, hub id, {EMBEDDED} or {serve.RANDOM} (152 M parameters; default)"
    one.add_argument("--model", metavar="MODEL", help=of)
    one.add_argument("--vllm", default=serve.program(), metavar="PROGRAM", help="default: the one of this environment")
    one.add_ratio()
    at_once = {"type": positive, "nargs": "+", "default": [1, 8, 32], "metavar": "N"}
    one.add_argument("--concurrency", **at_once, help="requests at once; default: 1 8 32")
    one.add_argument("--requests", type=positive, default=32, help="of each measurement, at least; default: 32")
    size = {"type": _pair("WIDTHxHEIGHT", "336x336"), "default": (336, 336), "metavar": "WxH"}
    one.add_argument("--image", **size, help="their size; default: 336x336")
    one.add_argument("--new-tokens", type=positive, default=16, help="default: 16")
    one.add_argument("server_options", nargs="*", metavar="-- OPTION", help="of vllm serve, after --")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
