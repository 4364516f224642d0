"""llava-mini in transformers' own format: made at first use, once, and made again where a part of it is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava import hf
from llava.command import EMBEDDED as OWN
from llava.model.builder import load_pretrained_model


@pytest.fixture
def exports(monkeypatch, tmp_path):
    """How often it was written."""
    calls = []

    def export(folder: Path) -> None:
        calls.append(folder)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": {}}))

    monkeypatch.setenv("LLAVA_MINI_CACHE", str(tmp_path))
    monkeypatch.setattr(hf, "_export", export)
    return calls


def test_is_made_once_and_again_where_a_part_is_gone(exports):
    path = hf.path_of("llava-mini-hf")
    assert hf.path_of("llava-mini-hf") == path and Path(path).name == "llava-mini-hf" and len(exports) == 1
    for damage in (Path(path, "config.json").unlink, lambda: shutil.rmtree(path)):
        damage()
        assert hf.path_of("llava-mini-hf") == path and Path(path, "config.json").exists()
    assert len(exports) == 3


def test_another_checkpoint_has_another_folder(exports, monkeypatch, tmp_path):
    before, other = hf.path_of("llava-mini-hf"), tmp_path / "other"
    other.write_bytes(b"weights")
    files = hf._files
    monkeypatch.setattr(hf, "_files", lambda checkpoint: [*files(checkpoint), other])
    assert hf.path_of("llava-mini-hf") != before and Path(before).exists()


def test_a_checkpoint_s_own_words_say_what_it_is(exports, tmp_path):
    assert hf.holds("llava-mini-hf") and not hf.holds(OWN) and not hf.holds(str(tmp_path))


def test_transformers_loads_it_and_llava_s_loader_says_what_it_is():
    path = hf.path_of("llava-mini-hf")
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    assert model.config.model_type == "llava" and processor.chat_template
    with pytest.raises(ValueError, match="transformers' own layout"):
        load_pretrained_model(path, None, "llava-mini-hf", device="cpu")
