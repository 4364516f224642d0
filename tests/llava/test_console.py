"""The console command ``llava``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from llava.__main__ import COMMANDS, main


def called(monkeypatch, *arguments: str) -> None:
    """Run ``llava`` with arguments; what does not end with status 0 raises."""
    monkeypatch.setattr(sys, "argv", ["llava", *arguments])
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_that_runs(name):
    module = COMMANDS[name][0].partition(":")[0]
    found = importlib.util.find_spec(f"{module}.__main__" if _is_package(module) else module)
    assert 'if __name__ == "__main__":' in Path(found.origin).read_text()


def _is_package(module: str) -> bool:
    return importlib.util.find_spec(module).submodule_search_locations is not None


def test_a_command_runs_as_its_module(monkeypatch, capsys):
    called(monkeypatch, "methods")
    assert "otprune\n    OTPrune, arXiv 2602.20205" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_all_commands(arguments, monkeypatch, capsys):
    called(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in COMMANDS)


def test_a_command_that_is_not_there_is_named(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        called(monkeypatch, "prune")
    assert end.value.code == 2 and "there is no command 'prune'" in capsys.readouterr().err
