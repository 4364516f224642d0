"""``llava COMMAND ...``: every command of the package by a short name; ``llava COMMAND --help`` says what it takes."""

from __future__ import annotations

import sys
from importlib import import_module

from llava.command import Parser

COMMANDS = {
    "ask": ("llava.eval.run_llava", "one question about an image"),
    "chat": ("llava.serve.cli:run", "a conversation about an image"),
    "demo": ("llava.serve.demo", "a web page to try pruning on your own image"),
    "methods": ("llava.pruning", "the pruning methods and their options"),
    "tokens": ("llava.eval.tokens", "which visual tokens a method keeps, drawn on the image"),
    "distances": ("llava.eval.distances", "how far kept tokens are from all tokens"),
    "rank": ("llava.eval.rank", "the effective rank of images, for budget=effective_rank"),
    "flops": ("llava.eval.flops", "what a prefill costs"),
    "latency": ("llava.eval.latency", "how long selection, prefill and answers take"),
    "table": ("llava.eval.table", "the table of finished runs"),
    "figures": ("llava.eval.figures", "figures of finished runs"),
    "report": ("llava.eval.report", "one page with table, figures and token maps"),
    "export": ("llava.serve.export_hf", "a checkpoint for transformers and vLLM"),
    "fitprune": ("llava.fitting.fitprune", "recipes of FitPrune"),
    "ocvtp": ("llava.fitting.ocvtp", "pruners of OC-VTP"),
    "scorer": ("llava.fitting.scorer", "trained scorers of visual tokens"),
    "train": ("llava.train.train", "instruction tuning"),
}


def main() -> None:
    """Run a command, as ``python -m`` with its module would."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        lines = [f"  {command:10} {what}" for command, (_, what) in COMMANDS.items()]
        Parser("llava").run(lambda _: print("usage: llava COMMAND ...", "", *lines, sep="\n"), [])
        return
    if name not in COMMANDS:
        print(f"llava: there is no command {name!r}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    path, _, function = COMMANDS[name][0].partition(":")
    sys.argv = [f"llava {name}", *arguments]
    module = import_module(path)
    if hasattr(module, "__path__"):
        module = import_module(f"{path}.__main__")
    raise SystemExit(getattr(module, function or "main")(arguments))


if __name__ == "__main__":
    main()
