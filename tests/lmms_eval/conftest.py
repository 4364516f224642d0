"""A working folder in which the unchanged builtin benchmarks find eight rows each, and a tiny checkpoint."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as Pictures
from pyarrow import parquet

ROWS = 8


def _png(seed: int) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Pictures.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _write(folder: Path, name: str, tables: dict[tuple[str, str], list[dict]]) -> None:
    """A data set as the hub lays it out; ``datasets`` prefers a folder of that name in the current directory."""
    target = folder / "lmms-lab-encoder" / name
    target.mkdir(parents=True)
    configs = []
    for (config, split), rows in tables.items():
        data = Dataset.from_list(rows)
        if "image" in data.column_names:
            data = data.cast_column("image", Image())
        parquet.write_table(data.data.table, target / f"{config}.parquet")
        configs.append({"config_name": config, "data_files": [{"split": split, "path": f"{config}.parquet"}]})
    (target / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")


def _write_benchmarks(folder: Path, mme_answer: str = "Yes") -> None:
    """POPE, MME and GQA in the real schemas; MME's first answer is ``mme_answer``."""
    pope = [
        {
            "question_id": str(index),
            "question": f"Is there a dog near number {index} in the image?",
            "answer": ("yes", "no")[index % 2],
            "image": _png(index),
        }
        for index in range(ROWS)
    ]
    mme = [
        {
            "question_id": f"color/{index // 2}.jpg",
            "question": f"Is thing number {index} red? Please answer yes or no.",
            "answer": mme_answer if index == 0 else ("Yes", "No")[index % 2],
            "category": "color",
            "image": _png(20 + index),
        }
        for index in range(ROWS)
    ]
    questions = [
        {"id": str(index), "imageId": f"n{index % 3}", "question": f"What is number {index}?", "answer": "dog"}
        for index in range(ROWS)
    ]
    pictures = [{"id": f"n{index}", "image": _png(40 + index)} for index in range(3)]
    _write(folder, "POPE", {("default", "test"): pope})
    _write(folder, "MME", {("default", "test"): mme})
    _write(
        folder,
        "GQA",
        {
            ("testdev_balanced_instructions", "testdev"): questions,
            ("testdev_balanced_images", "testdev"): pictures,
        },
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, golden_llava) -> Callable[[str], str]:
    """The path of a copy of a golden checkpoint that can be loaded from anywhere."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def copy(name: str = "llava-v1.5-tiny") -> str:
        target = folder / name
        if not (golden_llava / "checkpoints" / name).is_dir():
            pytest.skip(f"{name} is not part of the small golden copy")
        if not target.exists():
            shutil.copytree(golden_llava / "checkpoints" / name, target)
            config = json.loads((target / "config.json").read_text())
            config["mm_vision_tower"] = str(golden_llava / config["mm_vision_tower"])
            (target / "config.json").write_text(json.dumps(config))
        return str(target)

    return copy


@pytest.fixture(scope="session")
def write_benchmarks() -> Callable[..., None]:
    """Put the benchmarks, of eight rows each, into a folder."""
    return _write_benchmarks


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder to run in, with the benchmarks."""
    folder = tmp_path_factory.mktemp("workplace")
    _write_benchmarks(folder)
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Callable[..., subprocess.Popen]:
    """Start ``python -m ...`` offline, on the CPU, with caches of its own."""
    home = tmp_path_factory.mktemp("hf")

    def begin(folder: Path, command: Sequence[str], **switch: str) -> subprocess.Popen:
        environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **switch}
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return begin


@pytest.fixture(scope="session")
def run(start) -> Callable[..., tuple[int, str]]:
    """The same to its end: status and all that was printed."""

    def finish(folder: Path, command: Sequence[str], **switch: str) -> tuple[int, str]:
        process = start(folder, command, **switch)
        printed, _ = process.communicate(timeout=300)
        return process.returncode, printed

    return finish
