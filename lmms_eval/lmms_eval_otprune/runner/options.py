"""The command line: what can be chosen, checked at once. Imports nothing beyond the standard library."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.command import RATIO, Parser, positive, ratio, whole, whole_number

from .suites import GROUPS, SUITES, check_tasks

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "float16", "bfloat16")
LARGEST_SEED = 2**32 - 1
"""NumPy takes no larger one."""
OFF = "off"


@dataclass(frozen=True)
class Options:
    """A checked command line; None where the suite or the machine decides (see `plan`)."""

    suite: str | None
    models: tuple[str, ...]
    model_base: str | None
    methods: tuple[str, ...] | None
    ratios: tuple[float, ...]
    layer: int | None
    tasks: tuple[str, ...]
    unpruned: bool
    grey: bool
    all_metrics: bool
    limit: int | None
    batch_size: int | None
    num_processes: int | None
    num_machines: int
    machine_rank: int
    main_process_ip: str | None
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
    found = vars(parser.parse_args(arguments))
    found["models"] = tuple(model for text in found["models"] or () for model in _models(text))
    options = Options(**found)
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _check(options: Options) -> None:
    check_tasks(options.tasks)
    if options.machine_rank >= options.num_machines:
        raise ValueError(
            f"--machine-rank {options.machine_rank}: with --num-machines {options.num_machines} it must be "
            f"0 to {options.num_machines - 1}"
        )
    if options.num_machines > 1 and options.main_process_ip is None:
        raise ValueError("--num-machines needs --main-process-ip, the address of the machine of rank 0")
    if options.methods == () and not options.unpruned:
        raise ValueError("--method none with --no-unpruned leaves nothing to run")


def _parser() -> Parser:
    switch = os.environ
    method = switch.get("BASELINE") or ("ocvtp" if switch.get("OCL_ENABLE", "").lower() in ("1", "true") else None)
    defaults = "; ".join(f"{suite.name}: {','.join(suite.methods)}" for suite in SUITES.values())
    parser = Parser(
        prog="run_OTPrune.sh",
        description="Evaluate LLaVA with and without visual token pruning, and write the table. The same command "
        "continues an interrupted run.",
        epilog="Without a suite: paper where there is a CUDA GPU, mini elsewhere.",
    )
    add = parser.add_argument
    about = "mini, and documents, which have to be read: embedded models and data sets, minutes on a CPU; paper: "
    about += "published checkpoints and benchmarks"
    add("suite", nargs="?", choices=tuple(SUITES), help=about)
    about = "checkpoint folder or hub id, of a LLaVA or a model of transformers, or llava-mini or llava-mini-reader, "
    about += "which are embedded; may be given repeatedly"
    add(
        "--model",
        "--model-path",
        action="append",
        dest="models",
        metavar="PATH",
        help=f"{about} (default: the suite's)",
    )
    add("--model-base", metavar="PATH", help="language model that LoRA or projector-only checkpoints are put on")
    about = "pruning methods, with options as random:seed=1, a ratio or layer of their own as fastv:ratio=0.2:layer=3"
    about = f"{about}; none: unpruned only (default: {method or defaults})"
    add("--method", dest="methods", type=_methods, default=method, metavar="NAME[,NAME]", help=about)
    about = "fractions of the visual tokens kept, 0 < r <= 1 (default: %(default)s); a method whose options are a "
    about += "budget of their own runs once, without it"
    kept = switch.get("SUBSET_RATIO") or str(RATIO)
    add("--ratio", dest="ratios", type=_ratios, default=kept, metavar="R[,R]", help=about)
    about = "prune at the input of decoder layer L, with every method that states no layer; 0: before the decoder"
    layer = switch.get("LAYER_INDEX") or None
    add("--layer", type=whole, default=layer, metavar="L", help=f"{about} (default: the method's, 0 for most)")
    add("--no-unpruned", dest="unpruned", action="store_false", help="leave the unpruned run out")
    about = "also run the unpruned model on grey images: what it knows without seeing"
    add("--grey", action="store_true", help=about)
    about = "a choice of the suite's tasks, or others that lmms-eval has, each shown by its first metric; a group, "
    about += f"{' or '.join(GROUPS)} (default: the suite's tasks)"
    add("--tasks", type=_names, default="", metavar="TASK[,TASK]", help=about)
    about = "of captions, also the metrics that the table does not show (BLEU, METEOR, ROUGE-L): about 15 s a task"
    add("--all-metrics", action="store_true", help=about)
    add("--limit", type=positive, metavar="N", help="only the first N documents of each task")
    about = "prompts generated together (default: the device's)"
    add("--batch-size", type=positive, metavar="N", help=about)
    about = "on this machine (default: one a GPU; embedded models on a CPU: one a core)"
    add("--num-processes", type=positive, metavar="N", help=about)
    add("--num-machines", type=positive, default=1, metavar="N", help="start the command on each of them")
    add("--machine-rank", type=whole, default=0, metavar="N", help="this machine, counted from 0")
    add("--main-process-ip", metavar="ADDRESS", help="address of the machine of rank 0")
    about = "default: %(default)s"
    add("--main-process-port", type=whole_number(1, 65535), default=29511, metavar="PORT", help=about)
    about = "of Python, NumPy and torch (default: %(default)s)"
    add("--seed", type=whole_number(0, LARGEST_SEED), default=1234, metavar="N", help=about)
    add("--dtype", choices=DTYPES, default="auto", help="auto: float32 on a CPU, float16 on a GPU")
    about = "conversation template of the prompts, a name of llava.conversation's (default: each checkpoint's)"
    add("--conv-template", default="auto", metavar="NAME", help=about)
    add("--device", choices=DEVICES, default="auto", help="default: CUDA where there is one, else the CPU")
    about = (
        "disk, in the result folder and until all is done, for encoded images that all methods share; 0: none, each "
        "process remembers some in memory; off: every image is encoded whenever it comes (default: 8 on a CPU, 0 on a "
        "GPU)"
    )
    add("--visual-cache", type=_visual_cache, metavar="GIB", help=about)
    add("--output", type=Path, metavar="DIR", help="result folder (default: results/SUITE)")
    about = "leave out the HTML report with figures that is made at the end"
    add("--no-report", dest="report", action="store_false", help=about)
    add("--dry-run", action="store_true", help="say what would be run, and run nothing")
    return parser


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if text and not names:
        raise ArgumentTypeError(f"names nothing: {text!r}")
    return names


def _models(text: str) -> tuple[str, ...]:
    # A folder's name may hold a comma.
    return (text,) if Path(text).is_dir() else _names(text)


def _methods(text: str) -> tuple[str, ...]:
    return tuple(name for name in _names(text) if name.lower() not in ("none", "orig"))


def _ratios(text: str) -> tuple[float, ...]:
    return tuple(map(ratio, _names(text) or ("",)))


def _visual_cache(text: str) -> float | str:
    try:
        value = -1 if "_" in text else float(text)
    except ValueError:
        value = -1
    if text == OFF or 0 <= value < float("inf"):
        return text if text == OFF else value
    raise ArgumentTypeError(f"must be a number >= 0, or {OFF}, not {text}")


if __name__ == "__main__":
    read(sys.argv[1:])
