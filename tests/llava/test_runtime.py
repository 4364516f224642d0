"""The running process: what a shell leaves it, and what it may print."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import llava
from llava.command import Parser
from llava.runtime import forget_place, print_everything

PACKAGE = Path(llava.__file__).parent
GUARD = 'if __name__ == "__main__":\n'
FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
# The console script, and a former name of a command, run others as they are.
COMMANDS = {
    name: text
    for name, text in FILES.items()
    if GUARD in text and name != "__main__.py" and "runpy.run_module(" not in text
}


def test_what_the_terminal_s_encoding_lacks_is_printed_as_escapes(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="iso-8859-1"))
    print_everything()
    print("é † 小", flush=True)
    assert shown.getvalue() == b"\xe9 \\u2020 \\u5c0f\n"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_prints_everything(command):
    text = COMMANDS[command]
    in_the_frame = "llava.command import" in text and ".run(" in text
    assert in_the_frame or GUARD + "    print_everything()\n" in text


def test_the_frame_prints_everything(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="iso-8859-1"))
    assert Parser("command", "about").run(lambda _: print("†", flush=True), []) == 0
    assert shown.getvalue() == b"\\u2020\n"


def test_the_place_in_another_launch_is_forgotten_and_nothing_else():
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "NCCL_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    left = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "x",
        "OMPI_COMM_WORLD_RANK": "1",
        "SLURM_PROCID": "1",
    }
    environ = kept | left
    forget_place(environ)
    assert environ == kept
