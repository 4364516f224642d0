"""A method that another package brings: the documented example, installed and switched on by the environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llava.pruning import PruningConfig, VisualTokens, available_methods
from llava.pruning.__main__ import main

DOCUMENT = Path(__file__).parents[2] / "LLaVA" / "docs" / "methods.md"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The page's Python and entry point, laid out as pip would install them."""
    page = DOCUMENT.read_text(encoding="utf-8")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    own = page.partition("## A method of your own")[2]
    (tmp_path / "my_package" / "my_module.py").write_text(re.search(r"```python\n(.*?)```", own, re.S)[1])
    group, line = re.search(r'```toml\n\[project\.entry-points\."(.+?)"\]\n(.*?)\n```', page, re.S).groups()
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_the_documented_method_runs(example):
    environ = {"BASELINE": "LARGEST_NORM", "LARGEST_NORM_POWER": "1.5", "SUBSET_RATIO": "0.5"}
    config = PruningConfig.from_env(environ)
    assert config.to_dict()["options"] == {"power": 1.5}
    features = torch.tensor([[[1.0, 1.0], [5.0, 0.0], [0.1, 0.1], [3.0, 3.0]]])
    assert config.build_pruner().indices(VisualTokens(features, 2)).tolist() == [[1, 3]]


def test_it_is_listed_with_its_options(example, capsys):
    assert available_methods()["largest_norm"].options == {"power": 2.0}
    main([])
    listing = capsys.readouterr().out
    assert "largest_norm\n    an example" in listing and "LARGEST_NORM_POWER=2.0" in listing
    assert "OTPRUNE_GAMMA=unset, OTPRUNE_COMPAT=False" in listing


def test_its_wrong_options_are_named_like_any_others(example):
    with pytest.raises(ValueError, match=r"LARGEST_NORM_POWER=big: must be a number"):
        PruningConfig.from_env({"BASELINE": "LARGEST_NORM", "LARGEST_NORM_POWER": "big", "SUBSET_RATIO": "0.5"})
