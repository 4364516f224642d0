"""The command line: ``python -m llava.eval.latency select|prefill|generate|suite|serve``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from llava.adapters.vllm.switch import check_servable
from llava.command import EMBEDDED, Parser, find_device, positive
from llava.eval.latency import pope, prefill, select, serve, suite
from llava.eval.latency.methods import read_methods
from llava.eval.latency.models import RANDOM, is_llava, load
from llava.eval.latency.report import NOT_MEASURED, Report, mebibytes, milliseconds, table
from llava.flops.made_up import PUBLISHED

DTYPES = ("float32", "float16", "bfloat16")


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
    settings = {
        "width": arguments.width,
        "repetitions": arguments.repetitions,
        "device": arguments.device,
        "dtype": arguments.dtype,
    }
    rows = select.measure(sizes, arguments.method, **settings)
    if arguments.curve:
        points = {
            axis: select.measure(along, arguments.method, **settings) for axis, along in select.curve(sizes).items()
        }
        report.write_curve(points)
        rows += [row | {"axis": axis} for axis, along in points.items() for row in along]
    columns = {
        "method": lambda row: row["method"],
        "N -> k": lambda row: f"{row['n']} -> {row['k']}",
        "images": lambda row: str(row["batch"]),
        "times as fast as published": lambda row: f"{row['times_published']:.2f}",
        "times DivPrune's": lambda row: "" if row["of_divprune"] is None else f"{row['of_divprune']:.2f}",
        _ms_column("ms", arguments.device): lambda row: milliseconds(row["ms"]),
        "peak MiB": lambda row: mebibytes(row["peak_bytes"]),
    }
    return rows, table(columns, [row for row in rows if "axis" not in row])


def _prefill(arguments: argparse.Namespace, report: Report) -> tuple[list[dict[str, Any]], str]:
    configs = read_methods(arguments.method, arguments.ratio)
    model = load(arguments.model, arguments.device, arguments.dtype, arguments.attention)
    if getattr(arguments, "pope", None) and not is_llava(model):
        raise ValueError(f"--pope needs a LLaVA, whose encoded images can be remembered, not {arguments.model}")
    new_tokens = 1 if arguments.command == "prefill" else arguments.new_tokens
    rows = []
    for batch in arguments.batch:
        settings = {"batch": batch, "new_tokens": new_tokens, "repetitions": arguments.repetitions}
        rows += prefill.measure(model, configs, **settings)
    parts = [prefill.TTFT, prefill.VISION, prefill.SELECTION, prefill.PREFILL]
    parts += [prefill.DECODING] if new_tokens > 1 else []
    columns = {
        "method": lambda row: row["method"],
        "batch": lambda row: str(row["batch"]),
        "visual tokens": lambda row: f"{row['visual_tokens']:.1f}",
        "TTFT / unpruned": lambda row: f"{row['ttft_ratio']:.3f}",
        "total / unpruned": lambda row: f"{row['total_ratio']:.3f}",
        "selection / prefill": lambda row: f"{100 * row['selection_share']:.1f} %",
        **{_ms_column(part, arguments.device): _part(part) for part in parts},
        **({"answers/s": lambda row: f"{row['samples_per_second']:.3g}"} if new_tokens > 1 else {}),
        "KV MiB": lambda row: mebibytes(row["kv_bytes"]),
        "peak MiB": lambda row: mebibytes(row["peak_bytes"]),
    }
    text = table(columns, rows)
    if getattr(arguments, "pope", None):
        images, questions = arguments.pope
        asked = pope.measure(
            model,
            configs,
            images=images,
            questions=questions,
            batches=arguments.batch,
            cache_bytes=arguments.cache_mib * 2**20,
            images_one_by_one=arguments.pope_one_by_one,
        )
        text += f"\n\n{images} images, {questions} questions each:\n\n{table(_run_columns(), asked)}"
        rows += [row | {"run": "pope"} for row in asked]
    return rows, text


def _suite(arguments: argparse.Namespace, report: Report) -> tuple[list[dict[str, Any]], str]:
    rows = suite.measure(
        arguments.model,
        arguments.method,
        ratio=arguments.ratio,
        batches=arguments.batch,
        tasks=arguments.tasks,
        limit=arguments.limit,
        device=str(arguments.device),
        folder=report.folder / "runs",
    )
    return rows, table(_run_columns(), rows)


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
            server = serve.started(
                arguments.vllm, arguments.model or serve.RANDOM, config, arguments.server_options, log
            )
        with server as url:
            rows += serve.measure(url, arguments.vllm, name, config.ratio, load)
    columns = {
        "method": lambda row: row["method"],
        "kept": lambda row: f"{100 * row['ratio']:.3g} %",
        "at once": lambda row: str(row["concurrency"]),
        "requests/s / unpruned": lambda row: f"{row['times_unpruned']:.2f}",
        "requests/s": lambda row: f"{row['requests_per_second']:.3g}",
        "TTFT p50 / p95, ms": lambda row: f"{row['ttft_ms']['p50']:.0f} / {row['ttft_ms']['p95']:.0f}",
        "tokens per prompt": lambda row: f"{row['prompt_tokens']:.0f}",
        "KV blocks": lambda row: NOT_MEASURED if row["kv_blocks"] is None else str(row["kv_blocks"]),
    }
    return rows, table(columns, rows)


def _run_columns() -> dict[str, Any]:
    return {
        "method": lambda row: row["method"],
        "batch": lambda row: str(row["batch"]),
        "cache": lambda row: "on" if row["cached"] else "off",
        "samples/s / its batch-1 run without a cache": lambda row: f"{row['times_plain']:.2f}",
        "samples/s / unpruned batch-1 run without a cache": lambda row: f"{row['times_unpruned']:.2f}",
        "hits": lambda row: f"{row['hits']:.0f}",
        "same answers": lambda row: f"{100 * row['same_answers']:.1f} %" if "same_answers" in row else "",
    }


COMMANDS = {"select": _select, "prefill": _prefill, "generate": _prefill, "suite": _suite, "serve": _serve}


def _part(name: str):
    return lambda row: milliseconds(row["ms"][name])


def _ms_column(part: str, device: torch.device) -> str:
    name = part if part == "ms" else f"{part}, ms"
    return name if device.type == "cuda" else f"{name} on this machine"


def _pope(text: str) -> tuple[int, int]:
    images, _, questions = text.partition("x")
    if not (images.isdecimal() and questions.isdecimal() and int(images) and int(questions)):
        raise argparse.ArgumentTypeError(f"must be IMAGESxQUESTIONS, such as 500x18, not {text!r}")
    return int(images), int(questions)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, such as 336x336, not {text!r}")
    return int(width), int(height)


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
    one.add_argument("--pope", type=_pope, metavar="IxQ", help=questions)
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
    one.add_argument("--image", type=_size, default=(336, 336), metavar="WxH", help="their size; default: 336x336")
    one.add_argument("--new-tokens", type=positive, default=16, help="default: 16")
    one.add_argument("server_options", nargs="*", metavar="-- OPTION", help="of vllm serve, after --")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
