"""The notebooks of LLaVA/docs/examples: their code runs as it stands, and prints what is stored with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "LLaVA" / "docs" / "examples").glob("*.ipynb"))
NUMBER = re.compile(r"\d+(?:\.\d+)?")
RUN = """
import contextlib, io, json, sys, types
for path in sys.argv[1:]:
    name = path.rpartition("/")[2].removesuffix(".ipynb")
    notebook = sys.modules[name] = types.ModuleType(name)
    printed = []
    for cell in json.load(open(path))["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("".join(cell["source"]), path, "exec"), notebook.__dict__)
            printed.append(output.getvalue())
    print(json.dumps([name, printed]))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, list[str]]:
    """What each notebook's code cells print, all run in one process."""
    run = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, EXAMPLES)],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("notebooks"),
        env={**os.environ, "MPLBACKEND": "agg"},
    )
    assert run.returncode == 0, run.stderr
    return dict(map(json.loads, run.stdout.splitlines()))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_notebook_prints_what_is_stored_in_it(path, printed):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell, now in zip(cells, printed[path.stem], strict=True):
        stored = "".join(text for output in cell["outputs"] for text in output.get("text", ()))
        assert NUMBER.sub("#", now) == NUMBER.sub("#", stored)
        # Rounding differs between machines, and with it now and then an answer.
        assert numbers(now) == pytest.approx(numbers(stored), abs=2, rel=0.02)


def numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]
