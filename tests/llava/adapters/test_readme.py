"""The README's first lines of Python run as they stand, on the embedded model."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_example_prunes_and_answers(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(from transformers .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LLaVA").symlink_to(ROOT / "LLaVA")
    exec(code, {})
    assert capsys.readouterr().out.splitlines()[-1] == "yes [(576, 56)]"
