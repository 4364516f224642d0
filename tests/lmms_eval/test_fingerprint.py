"""What answers and results are remembered by: it changes with all that makes them, and with nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from lmms_eval_otprune.models import digests, fingerprint
from lmms_eval_otprune.models.fingerprint import checkpoint_fingerprint, code_fingerprint, model_fingerprint
from lmms_eval_otprune.runner import options, plan, tasks

import llava


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Where digests are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint with its tower inside, written an hour ago."""
    folder = tmp_path / "checkpoint"
    (folder / "tower").mkdir(parents=True)
    write(folder / "config.json", json.dumps({"mm_vision_tower": "tower"}).encode())
    write(folder / "model.safetensors", b"a" * 300_000)
    write(folder / "tower" / "config.json", b"{}")
    write(folder / "tower" / "model.safetensors", b"b" * 1000)
    return folder


def write(path: Path, content: bytes, age: float = 3600) -> None:
    path.write_bytes(content)
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))


class TestCheckpoint:
    @pytest.mark.parametrize("place", [0, 70_000, 150_000, 299_999])
    def test_every_byte_of_its_weights_counts(self, checkpoint, place):
        before = checkpoint_fingerprint(str(checkpoint))
        assert before == checkpoint_fingerprint(str(checkpoint))
        weights = bytearray(b"a" * 300_000)
        weights[place] += 1
        write(checkpoint / "model.safetensors", weights, age=1800)
        assert checkpoint_fingerprint(str(checkpoint)) != before

    def test_its_tower_counts(self, checkpoint):
        before = checkpoint_fingerprint(str(checkpoint))
        write(checkpoint / "tower" / "model.safetensors", b"c" * 1000, age=1800)
        assert checkpoint_fingerprint(str(checkpoint)) != before

    def test_where_it_lies_and_what_is_not_loaded_count_for_nothing(self, checkpoint, tmp_path):
        before = checkpoint_fingerprint(str(checkpoint))
        moved = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
        (moved / "checkpoint-100").mkdir()
        write(moved / "checkpoint-100" / "optimizer.bin", b"o")
        write(moved / "README.md", b"r")
        assert checkpoint_fingerprint(str(moved)) == before

    def test_is_read_once(self, checkpoint, monkeypatch):
        before = checkpoint_fingerprint(str(checkpoint))
        monkeypatch.setattr(digests, "_sha256", lambda path: pytest.fail(f"{path} was read again"))
        assert checkpoint_fingerprint(str(checkpoint)) == before

    def test_a_file_that_was_written_just_now_is_read_again(self, checkpoint):
        write(checkpoint / "model.safetensors", b"a" * 300_000, age=0)
        stat = (checkpoint / "model.safetensors").stat()
        before = checkpoint_fingerprint(str(checkpoint))
        (checkpoint / "model.safetensors").write_bytes(b"d" * 300_000)
        os.utime(checkpoint / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert checkpoint_fingerprint(str(checkpoint)) != before

    @pytest.mark.parametrize("memory", ["no JSON", "[1]", '{"a": [1]}'])
    def test_does_not_depend_on_what_is_remembered(self, checkpoint, cache, memory):
        before = checkpoint_fingerprint(str(checkpoint))
        (cache / "otprune" / "digests.json").write_text(memory)
        assert checkpoint_fingerprint(str(checkpoint)) == before

    def test_does_without_a_place_to_remember(self, checkpoint, tmp_path, monkeypatch):
        before = checkpoint_fingerprint(str(checkpoint))
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert checkpoint_fingerprint(str(checkpoint)) == before


class TestHub:
    """A checkpoint that is not here yet."""

    @pytest.fixture
    def hub(self, tmp_path, monkeypatch) -> dict[str, str]:
        """Repository -> its newest revision; asking for a configuration downloads that revision's."""
        revisions = {"owner/model": "1" * 40, "openai/tower": "2" * 40}

        def download(repository: str) -> dict:
            folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
            snapshot = folder / "snapshots" / revisions[repository]
            for place in (snapshot, folder / "refs"):
                place.mkdir(parents=True, exist_ok=True)
            (folder / "refs" / "main").write_text(revisions[repository])
            config = {"mm_vision_tower": "openai/tower"} if repository == "owner/model" else {}
            (snapshot / "config.json").write_text(json.dumps(config))
            return config

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(fingerprint, "read_config", download)
        return revisions

    def test_has_the_name_that_it_has_afterwards(self, hub):
        chosen = options.read(["paper", "--model", "owner/model", "--device", "cpu", "--no-unpruned"])
        made = plan.make_plan(chosen)
        before = tasks.task_identities(made.jobs[0], made, chosen)
        assert tasks.task_identities(made.jobs[0], made, chosen) == before

    @pytest.mark.parametrize("repository", ["owner/model", "openai/tower"])
    def test_has_another_name_for_another_revision(self, hub, repository):
        before = checkpoint_fingerprint("owner/model")
        hub[repository] = "3" * 40
        assert checkpoint_fingerprint("owner/model") != before


COUNTING = ("model/llava_arch.py", "pruning/methods/fastv.py", "fitting/fitprune/fit.py", "fitting/prompts.py")
NOT_COUNTING = ("eval/table.py", "serve/cli.py")


@pytest.mark.parametrize(
    ("module", "counting", "others"),
    [(llava, COUNTING, NOT_COUNTING), (fingerprint, ("prompts.py", "settings.py"), ())],
)
def test_code_counts_where_it_makes_answers(tmp_path, monkeypatch, module, counting, others):
    def no_code(_, names: list[str]) -> set[str]:
        return {name for name in names if "." in name[-5:] and not name.endswith(".py")}

    copy = shutil.copytree(Path(module.__file__).parent, tmp_path / "copy", ignore=no_code)
    monkeypatch.setattr(module, "__file__", str(copy / "__init__.py"))
    before = code_fingerprint()
    for file in (*others, *counting):
        with (copy / file).open("a") as source:
            source.write("# changed")
        after = code_fingerprint()
        assert (after != before) == (file in counting), file
        before = after


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_versions_count(checkpoint, monkeypatch, package):
    known = fingerprint.version
    before = model_fingerprint(str(checkpoint), None, "float32", "sdpa", "vicuna_v1")
    monkeypatch.setattr(fingerprint, "version", lambda name: "99.0" if name == package else known(name))
    assert model_fingerprint(str(checkpoint), None, "float32", "sdpa", "vicuna_v1") != before
