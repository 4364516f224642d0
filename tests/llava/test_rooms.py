"""Which part of the package may import which, and that selecting tokens takes torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llava
from llava.pruning.signals import SIGNALS

PACKAGE = Path(llava.__file__).parent
DOCS = PACKAGE.parent / "docs"

ALLOWED = {
    "pruning": {"pruning", "files", "command"},
    "adapters": {"adapters", "pruning", "constants"},
    "model": {"model", "pruning", "constants", "legacy", "runtime", "mm_utils"},
    "flops": {"flops", "benchmarks", "pruning"},
    "train": {"train", "model", "constants", "conversation", "mm_utils", "images", "files", "command", "runtime"},
    "fitting": {
        *("fitting", "train", "model", "pruning", "mini", "flops", "benchmark_tasks"),
        *("constants", "conversation", "mm_utils", "images", "files", "command", "runtime"),
    },
}
"""Room -> the rooms and files that its modules import; `LAZILY` on top of these, inside functions."""
LAZILY = {
    "pruning": {"model.llava_arch", "adapters.transformers"},
    "flops": {"hf", "model.checkpoint", "mm_utils", "adapters.transformers"},
}


def imported(file: Path, lazily: bool) -> set[str]:
    """Our own modules that a file imports when it is imported itself, or only when something in it is called."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    inside = {id(node) for each in ast.walk(tree) if isinstance(each, functions) for node in ast.walk(each)}
    found = set()
    for node in ast.walk(tree):
        if (id(node) in inside) != lazily:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "llava":
            found |= {f"llava.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name.removeprefix("llava.") for name in found if name.startswith("llava.")}


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_stands_below_it(room):
    for file in sorted((PACKAGE / room).rglob("*.py")):
        at_once = {name.split(".")[0] for name in imported(file, lazily=False)}
        later = {name for name in imported(file, lazily=True) if name.split(".")[0] not in ALLOWED[room]}
        assert at_once <= ALLOWED[room], f"{file}: {at_once - ALLOWED[room]}"
        assert later <= LAZILY.get(room, set()), f"{file}: {later}"


def run(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_importing_select_takes_torch_and_the_pruning_part():
    loaded = run("import sys; from llava.pruning import select; print(*sys.modules)")
    assert {"transformers", "torchvision", "PIL"}.isdisjoint(loaded)
    ours = {name for name in loaded if name.split(".")[0] == "llava"}
    assert "llava.pruning.api" in ours
    assert all(name == "llava" or name.startswith("llava.pruning") for name in ours)


def test_selecting_by_features_takes_no_transformers():
    loaded = run(
        "import sys, torch\n"
        "from llava.pruning import available_methods, select\n"
        "for name, info in available_methods().items():\n"
        "    if info.where.startswith('before') and info.needs <= {'image_keys'}:\n"
        "        select(torch.randn(16, 8), k=4, method=name)\n"
        "        print('selected', name)\n"
        "print(*sys.modules)"
    )
    assert "otprune" in loaded and "dpp" in loaded
    assert {"transformers", "torchvision"}.isdisjoint(loaded)


def test_every_signal_is_in_the_documentation():
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    for signal in SIGNALS.values():
        row = f"| `{signal.name}` | {signal.computed_by} | {signal.shape} | {signal.meaning} |"
        assert row in page, row
