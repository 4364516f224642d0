"""The command line: what can be chosen, checked at once. Imports nothing beyond the standard library."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .suites import SUITES, suite_with

DEFAULT_RATIO = "0.098"
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "float16", "bfloat16")
WHOLE_NUMBERS = {
    "limit": (1, None),
    "batch_size": (1, None),
    "num_processes": (1, None),
    "num_machines": (1, None),
    "machine_rank": (0, None),
    "main_process_port": (1, 65535),
    "seed": (0, 2**32 - 1),
}
"""Option -> the smallest and the largest value; NumPy takes no other seeds."""
OFF = "off"


@dataclass(frozen=True)
class Method:
    """A pruning method as the command line names it: ``name`` or ``name:option=value:option=value``.

    Attributes
    ----------
    name : str
    options : tuple of (name, value)
        The method's own, and "ratio" and "layer" (see `plan`).
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{option}={value}" for option, value in self.options)])


@dataclass(frozen=True)
class Options:
    """A checked command line; None where the machine decides (see `plan`)."""

    suite: str | None
    models: tuple[str, ...]
    methods: tuple[Method, ...] | None
    ratios: tuple[str, ...]
    layer: str
    tasks: tuple[str, ...]
    unpruned: bool
    grey: bool
    all_metrics: bool
    limit: int | None
    batch_size: int | None
    num_processes: int | None
    num_machines: int
    machine_rank: int
    main_process_ip: str
    main_process_port: int
    seed: int
    dtype: str
    conv_template: str
    device: str
    visual_cache: float | str | None
    output: Path | None
    report: bool
    dry_run: bool


def read(arguments: Sequence[str]) -> Options:
    """Parse and check the command line; ends the program with one sentence and status 2 when a value is wrong."""
    parser = _parser()
    found = parser.parse_args(arguments)
    try:
        return _check(found)
    except ValueError as error:
        parser.error(str(error))


def _check(found: argparse.Namespace) -> Options:
    methods = None
    if found.method is not None:
        methods = tuple(_method(text) for text in _split(found.method) if text.lower() not in ("none", "orig"))
    ratios = tuple(_split(found.ratio))
    for ratio in ratios:
        if not 0 < _number(ratio, "--ratio") <= 1:
            raise ValueError(f"--ratio {ratio}: must be a number with 0 < r <= 1")
    if found.layer:
        _whole(found.layer, "--layer", 0)
    tasks = tuple(_split(found.tasks))
    for task in tasks:
        SUITES[found.suite or suite_with(task)].task(task)
    whole = {
        name: None if (text := getattr(found, name)) is None else _whole(text, f"--{name.replace('_', '-')}", *limits)
        for name, limits in WHOLE_NUMBERS.items()
    }
    if whole["machine_rank"] >= whole["num_machines"]:
        raise ValueError(
            f"--machine-rank {found.machine_rank}: with --num-machines {found.num_machines} it must be "
            f"0 to {whole['num_machines'] - 1}"
        )
    if found.visual_cache not in (None, OFF):
        found.visual_cache = _number(found.visual_cache, "--visual-cache", f"number >= 0, or {OFF}")
        if not 0 <= found.visual_cache < math.inf:
            raise ValueError(f"--visual-cache {found.visual_cache:g}: must be a number >= 0, or {OFF}")
    if whole["num_machines"] > 1 and found.main_process_ip is None:
        raise ValueError("--num-machines needs --main-process-ip, the address of the machine of rank 0")
    if methods == () and found.no_unpruned:
        raise ValueError("--method none with --no-unpruned leaves nothing to run")
    return Options(
        suite=found.suite,
        models=tuple(model for text in found.model or () for model in _models(text)),
        methods=methods,
        ratios=ratios,
        layer=found.layer,
        tasks=tasks,
        unpruned=not found.no_unpruned,
        grey=found.grey,
        all_metrics=found.all_metrics,
        main_process_ip=found.main_process_ip or "127.0.0.1",
        dtype=found.dtype,
        conv_template=found.conv_template,
        device=found.device,
        visual_cache=found.visual_cache,
        output=found.output,
        report=not found.no_report,
        dry_run=found.dry_run,
        **whole,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    switch = os.environ
    method = "ocvtp" if switch.get("OCL_ENABLE", "").lower() in ("1", "true") else None
    defaults = "; ".join(f"{suite.name}: {','.join(suite.methods)}" for suite in SUITES.values())
    parser = _Parser(
        prog="run_OTPrune.sh",
        description="Evaluate LLaVA with and without visual token pruning on eleven benchmarks, and write the table. "
        "The same command continues an interrupted run.",
        epilog="Without a suite: paper where there is a CUDA GPU, mini elsewhere.",
    )
    parser.add_argument(
        "suite",
        nargs="?",
        choices=tuple(SUITES),
        help="mini: the embedded model and data sets, minutes on a CPU; paper: published checkpoints and benchmarks",
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="PATH",
        help="checkpoint folder, Hub id or llava-mini; may be given several times (default: the suite's)",
    )
    parser.add_argument(
        "--method",
        default=switch.get("BASELINE") or method,
        metavar="NAME[,NAME]",
        help="pruning methods, with options as random:seed=1, and a ratio or layer of their own as "
        f"fastv:ratio=0.2:layer=3; none: unpruned only (default: {switch.get('BASELINE') or method or defaults})",
    )
    parser.add_argument(
        "--ratio",
        default=switch.get("SUBSET_RATIO") or DEFAULT_RATIO,
        metavar="R[,R]",
        help="fractions of the visual tokens kept, 0 < r <= 1 (default: %(default)s); a method whose options are a "
        "budget of their own runs once, without it",
    )
    parser.add_argument(
        "--layer",
        default=switch.get("LAYER_INDEX", ""),
        metavar="L",
        help="prune at the input of decoder layer L, with every method that has no layer of its own; 0: before the "
        "decoder (default: the method's, 0 for most)",
    )
    parser.add_argument("--no-unpruned", action="store_true", help="leave the unpruned run out")
    parser.add_argument(
        "--grey", action="store_true", help="also run the unpruned model on grey pictures: what it knows without seeing"
    )
    parser.add_argument(
        "--tasks", default="", metavar="TASK[,TASK]", help="a choice of the suite's tasks (default: all)"
    )
    parser.add_argument(
        "--all-metrics",
        action="store_true",
        help="of captions, also the metrics that the table does not show (BLEU, METEOR, ROUGE-L): about 15 s a task",
    )
    parser.add_argument("--limit", metavar="N", help="only the first N documents of each task")
    parser.add_argument("--batch-size", metavar="N", help="prompts generated together (default: the device's)")
    parser.add_argument(
        "--num-processes", metavar="N", help="on this machine (default: one a GPU; mini on a CPU: one a core)"
    )
    parser.add_argument("--num-machines", default="1", metavar="N", help="start the command on each of them")
    parser.add_argument("--machine-rank", default="0", metavar="N", help="this machine, counted from 0")
    parser.add_argument("--main-process-ip", metavar="ADDRESS", help="address of the machine of rank 0")
    parser.add_argument("--main-process-port", default="29511", metavar="PORT", help="default: %(default)s")
    parser.add_argument("--seed", default="1234", metavar="N", help="of Python, NumPy and torch (default: 1234)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: float32 on a CPU, float16 on a GPU")
    parser.add_argument(
        "--conv-template",
        default="auto",
        metavar="NAME",
        help="conversation template of the prompts, a name of llava.conversation's (default: each checkpoint's)",
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="default: CUDA where there is one, else the CPU"
    )
    parser.add_argument(
        "--visual-cache",
        metavar="GIB",
        help="disk, in the result folder and until all is done, for encoded images that all methods share; 0: none, "
        "each process remembers some in memory; off: every image is encoded whenever it comes (default: 8 on a CPU, "
        "0 on a GPU)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="result folder (default: results/SUITE)")
    parser.add_argument(
        "--no-report", action="store_true", help="leave out the HTML report with figures that is made at the end"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and run nothing")
    return parser


def _method(text: str) -> Method:
    name, *settings = text.split(":")
    options = []
    for setting in settings:
        option, equals, value = setting.partition("=")
        if not (option and equals):
            raise ValueError(f"--method {text}: an option reads name=value, not {setting!r}")
        if option.lower() in dict(options):
            raise ValueError(f"--method {text}: {option.lower()} is given twice")
        options.append((option.lower(), value))
    return Method(name.lower(), tuple(options))


def _models(text: str) -> list[str]:
    # A folder's name may hold a comma.
    return [text] if Path(text).is_dir() else _split(text)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, option: str, allowed: str = "number") -> float:
    # float and int also take 1_0 for 10, and digits of every script.
    try:
        return float(text if text.isascii() and "_" not in text else "none")
    except ValueError:
        raise ValueError(f"{option} {text}: must be a {allowed}") from None


def _whole(text: str, option: str, low: int, high: int | None = None) -> int:
    digits = text.removeprefix("+")
    if digits.isascii() and digits.isdecimal() and int(digits) >= low and (high is None or int(digits) <= high):
        return int(digits)
    raise ValueError(
        f"{option} {text}: must be a whole number {f'>= {low}' if high is None else f'from {low} to {high}'}"
    )


if __name__ == "__main__":
    read(sys.argv[1:])
