"""Which files and functions of llava one `generate` enters, up to the first logits: python tests/support/entered.py

An image and a question on the tests' model, pruned by OTPrune before the decoder. Lines are those of the bodies of the
functions that were called, without docstrings, each counted once. A stay is a run of calls in one file, not counting
functions of one or two lines.
"""

from __future__ import annotations

import ast
import inspect
import sys
import tempfile
import textwrap
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType

import torch

from tiny_llava import build, pixels, prompt, save_tower

INSIDE = "prepare_inputs_labels_for_multimodal"


def body_lines(code: CodeType) -> int:
    """Lines of a function's body without its docstring."""
    body = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0].body
    if isinstance(body[0], ast.Expr) and isinstance(getattr(body[0], "value", None), ast.Constant):
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def called_by(frame: FrameType | None, name: str) -> bool:
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


def main() -> None:
    from llava.pruning import pruning

    model = build(save_tower(Path(tempfile.mkdtemp())))
    calls: list[tuple[str, CodeType, bool]] = []

    def note(frame: FrameType, event: str, _) -> None:
        code = frame.f_code
        if event == "call" and "/LLaVA/llava/" in code.co_filename and not code.co_name.startswith("<"):
            calls.append((code.co_filename.split("/LLaVA/llava/")[1], code, called_by(frame, INSIDE)))

    asked = {"inputs": prompt(3, 5)[None], "images": pixels(1), "max_new_tokens": 1, "do_sample": False}
    with torch.no_grad(), pruning(model, "otprune", ratio=0.25):
        model.generate(**asked)  # what is imported at the first use
        sys.setprofile(note)
        model.generate(**asked)
        sys.setprofile(None)
    functions: dict[str, dict[CodeType, int]] = defaultdict(dict)
    for file, code, _ in calls:
        functions[file].setdefault(code, body_lines(code))
    for file, own in functions.items():
        print(
            f"{file:46} {sum(own.values()):4}  {', '.join(f'{code.co_name} {n}' for code, n in own.items() if n > 2)}"
        )
    total = sum(sum(own.values()) for own in functions.values())
    print(f"{len(functions)} files, {total} lines of bodies")
    entered = (file for file, code, inside in calls if inside and functions[file][code] > 2)
    stays = [file for file, _ in groupby(entered)]
    print(f"inside {INSIDE}: {len(stays)} stays in {len(set(stays))} files")


if __name__ == "__main__":
    main()
