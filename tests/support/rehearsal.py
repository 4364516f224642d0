"""scripts/measure_gpu.sh on a machine without a GPU: its commands are noted, not run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "LLaVA" / "scripts" / "measure_gpu.sh"

PYTHON = """#!/bin/bash
case "$1" in
    -) cat >/dev/null; exit ;;  # looks for a GPU
    -c) exit ;;  # looks for a package
esac
printf '%q ' "$@" >>{log}
echo >>{log}
echo "as if it had run"
[[ " $* " != *" {fails} "* ]]
"""
TIMEOUT = """#!/bin/bash
echo "$3" >>{limits}
shift 3
exec "$@"
"""


@dataclass(frozen=True)
class Rehearsed:
    """How a rehearsal ended, the arguments of each Python it started, seconds that each might take, and its record."""

    done: subprocess.CompletedProcess
    commands: list[list[str]]
    limits: list[int]
    record: list[dict]


def rehearse(folder: Path, *steps: str, fails: str = "nothing", **environment: str) -> Rehearsed:
    """Run the script with a Python that fails where ``fails`` is among the arguments."""
    tools, output = folder / "tools", folder / "results"
    tools.mkdir()
    files = {"log": tools / "log", "limits": tools / "limits"}
    for name, text in {"python": PYTHON, "timeout": TIMEOUT}.items():
        text = text.replace("{fails}", fails)
        for key, file in files.items():
            text = text.replace(f"{{{key}}}", shlex.quote(str(file)))
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
        files[name] = tools / name
    path = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(output), *steps],
        env={**os.environ, **path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = files["log"].read_text().splitlines() if files["log"].exists() else []
    limits = files["limits"].read_text().split() if files["limits"].exists() else []
    record = output / "steps.jsonl"
    return Rehearsed(
        done,
        [shlex.split(line) for line in lines],
        [int(limit) for limit in limits],
        [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else [],
    )
