"""Files that are written whole or not at all, and what is said where they cannot be."""

from __future__ import annotations

import importlib
import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava.files import atomic_write, check_writable, write_json
from run_folders import job, write_run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestWritten:
    def test_are_text_bytes_and_what_a_function_leaves(self, tmp_path):
        atomic_write(tmp_path / "new" / "text", "é\n")
        atomic_write(tmp_path / "bytes", b"\x00\r\n")
        atomic_write(tmp_path / "called", lambda path: path.write_text("by a function"))
        assert (tmp_path / "new" / "text").read_bytes() == b"\xc3\xa9\n"
        assert (tmp_path / "bytes").read_bytes() == b"\x00\r\n"
        assert (tmp_path / "called").read_text() == "by a function"
        assert names(tmp_path) == ["bytes", "called", "new"]

    def test_json_can_hold_a_name_that_is_no_utf8(self, tmp_path):
        write_json(tmp_path / "a.json", {"model": os.fsdecode(b"m\xff"), "folder": tmp_path})
        assert f'"folder": "{tmp_path}"' in (tmp_path / "a.json").read_text()
        assert r"m\udcff" in (tmp_path / "a.json").read_text()

    def test_is_what_a_link_names(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "file")
        for text in ("first", "second"):
            atomic_write(tmp_path / "link", text)
            assert (tmp_path / "file").read_text() == text
        assert (tmp_path / "link").is_symlink()

    def test_a_file_has_the_rights_of_any_new_one(self, tmp_path):
        (tmp_path / "usual").write_text("")
        atomic_write(tmp_path / "ours", "")
        assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_a_device_stays_one(self):
        atomic_write("/dev/null", "gone")
        assert Path("/dev/null").is_char_device()


@contextmanager
def small_disk():
    """Files of this process may not grow beyond 4,096 bytes: writing fails in the middle, as on a full disk.

    No fixture: the test run's own output may be such a file, and is written while fixtures are up.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def ordinary_folder():
    """A folder of an ordinary user, who is asked in the place of root: for root nothing is read-only."""
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), os.geteuid() == 0
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
        folder.chmod(0o755)
        if root:
            os.seteuid(0)


class TestNotWritten:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("x" * 5000, "File too large"),
            (lambda path: path.write_text("x" * 5000), "File too large"),
            (lambda path: save_file({"x": torch.ones(5000)}, path), "File too large"),
            (lambda path: torch.save(torch.ones(5000), path), "not all of it could be written; the disk may be full"),
        ],
        ids=["text", "called", "safetensors", "torch"],
    )
    def test_half_a_file_is_no_file_and_takes_nothing_s_place(self, tmp_path, content, said):
        (tmp_path / "old").write_text("old")
        for name in ("old", "new"):
            with small_disk(), pytest.raises(OSError, match=f"^{tmp_path / name} cannot be written: {said}$"):
                atomic_write(tmp_path / name, content)
        assert names(tmp_path) == ["old"]
        assert (tmp_path / "old").read_text() == "old"

    def test_a_full_device_is_said(self):
        with pytest.raises(OSError, match=r"^/dev/full cannot be written: No space left on device"):
            atomic_write("/dev/full", "x")

    @pytest.mark.parametrize(
        ("path", "said"),
        [("", "it is a folder"), ("file/table.md", "file is no folder"), ("file/a/b", "file is no folder")],
    )
    def test_what_cannot_be_a_file_is_refused_before_and_when_it_is_written(self, tmp_path, path, said):
        (tmp_path / "file").write_text("")
        for write in (check_writable, lambda wanted: atomic_write(wanted, "x")):
            with pytest.raises(OSError, match=f"^{tmp_path / path} cannot be written: .*{said}$"):
                write(tmp_path / path)

    def test_what_is_read_only_is_refused(self, ordinary_folder):
        (ordinary_folder / "file").write_text("kept")
        (ordinary_folder / "file").chmod(0o444)
        with pytest.raises(PermissionError, match="it is read-only"):
            atomic_write(ordinary_folder / "file", "x")
        ordinary_folder.chmod(0o555)
        for write in (check_writable, lambda path: atomic_write(path, "x")):
            with pytest.raises(PermissionError, match=f"the folder {ordinary_folder} is read-only"):
                write(ordinary_folder / "new" / "file")
        assert names(ordinary_folder) == ["file"]

    def test_a_check_makes_nothing(self, tmp_path):
        check_writable(tmp_path / "a" / "b")
        assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("eval.table", ["no-run", "--output", "FILE/table.md"]),
        ("eval.figures", ["synthetic", "--output", "FILE"]),
        ("eval.report", ["no-run", "--output", "FILE/report.html"]),
        ("eval.flops.__main__", ["--json", "FILE/a.json"]),
        ("eval.tokens", ["--image", "IMAGE", "--ratio", "0.1", "--output", "FILE"]),
        ("eval.latency.__main__", ["select", "--output", "FILE"]),
        ("fitting.fitprune.__main__", ["fit", "--model", "none", "--reduction-ratio", "0.4", "--output", "FILE"]),
    ],
    ids=lambda value: value.split(".")[1] if isinstance(value, str) else "",
)
def test_commands_refuse_an_output_that_cannot_be_written_before_their_work(tmp_path, capsys, module, arguments):
    (tmp_path / "file").write_text("")
    given = [
        text.replace("FILE", str(tmp_path / "file")).replace("IMAGE", str(tmp_path / "none.png")) for text in arguments
    ]
    command = importlib.import_module(f"llava.{module}").main
    with pytest.raises((SystemExit, OSError)) as ended:
        raise SystemExit(command(given))
    said = f"{capsys.readouterr().err} {ended.value}"
    assert f"{tmp_path / 'file'} is no folder" in said


@pytest.mark.parametrize("name", ["table", "figures", "report"])
def test_commands_say_that_the_disk_is_full(tmp_path, capsys, monkeypatch, name):
    run = write_run(tmp_path / "run", {"unpruned": job({"mini_gqa": [True, False]})}, tasks=("mini_gqa",))
    output = tmp_path / "full"
    output.symlink_to("/dev/full")
    arguments = {
        "table": [str(run), "--output", str(output)],
        "report": [str(run), "--no-model", "--output", str(output)],
    }
    if name == "figures":
        synthetic = pytest.importorskip("llava.eval.plots.synthetic")
        outcomes = [synthetic.Outcome("otprune", "wasserstein", (20, 10, 5), 90.0, 80.0)]
        monkeypatch.setattr(synthetic, "run", lambda progress: outcomes)
        (tmp_path / "out").mkdir()
        output.rename(tmp_path / "out" / "synthetic.png")
        arguments["figures"] = ["synthetic", "--output", str(tmp_path / "out")]
    assert importlib.import_module(f"llava.eval.{name}").main(arguments[name]) == 2
    error = capsys.readouterr().err
    assert error.endswith("cannot be written: No space left on device\n") and error.count("\n") == 1
