"""run_OTPrune.sh and the set-up that it shares with tests/run.sh, in a copy of the repository whose path has spaces."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rehearsal import rehearse

ROOT = Path(__file__).parents[1]
NEEDED = (
    "run_OTPrune.sh",
    "tests/run.sh",
    "LLaVA/scripts",
    "LLaVA/pyproject.toml",
    "LLaVA/constraints.txt",
    "LLaVA/llava/__init__.py",
    "LLaVA/llava/benchmarks.py",
    "LLaVA/llava/command.py",
    "LLaVA/llava/files.py",
    "LLaVA/llava/runtime.py",
    "lmms_eval",
)
SCRIPTS = ("run_OTPrune.sh", "tests/run.sh", ".ci/run", "LLaVA/scripts/setup.sh", "LLaVA/scripts/measure_gpu.sh")

OLDEST = re.search(r'"transformers>=([\d.]+)"', (ROOT / "LLaVA" / "pyproject.toml").read_text())[1]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def clone(tmp_path) -> Path:
    folder = tmp_path / "a clone with spaces"
    for name in NEEDED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, target)
    return folder


def bash(clone: Path, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *command],
        cwd=cwd or clone,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def set_up(clone: Path, **environment: str) -> subprocess.CompletedProcess:
    script = 'set -euo pipefail; source LLaVA/scripts/setup.sh; set_up; echo "ready: $python"'
    return bash(clone, "-c", script, **environment)


@pytest.fixture
def prepared(clone) -> Path:
    """A clone whose .venv holds an interpreter that only notes what pip is asked for."""
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/bash\n[ "$1 $2" = "-m pip" ] || exec "{sys.executable}" "$@"\n'
        f'printf "%s\\n" "$*" >>"{clone}/pip.log"\nexit "${{PIP_STATUS:-0}}"\n'
    )
    python.chmod(0o755)
    return clone


def pip_calls(clone: Path) -> list[str]:
    log = clone / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_valid_bash(name):
    assert subprocess.run(["bash", "-n", str(ROOT / name)], check=False).returncode == 0


class TestMeasuringAGpu:
    def measure(self, clone, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return bash(clone, "LLaVA/scripts/measure_gpu.sh", *arguments, CUDA_VISIBLE_DEVICES="", **environment)

    def test_help_tells_what_it_does(self, clone):
        done = self.measure(clone, "--help")
        assert done.returncode == 0 and "bash LLaVA/scripts/measure_gpu.sh [DIR" in done.stdout

    def test_a_machine_without_a_gpu_is_told_in_one_sentence(self, clone, tmp_path):
        done = self.measure(clone, str(tmp_path / "results"))
        assert (done.returncode, done.stderr) == (2, "measure_gpu.sh: PyTorch sees no GPU on this machine\n")

    @pytest.mark.parametrize(
        ("name", "value"),
        [("POPE", "500"), ("POPE", "0x3"), ("ONE_BY_ONE", "no"), ("STEP_LIMIT", "0"), ("SUITE_LIMIT", "-1")],
    )
    def test_a_wrong_setting_is_refused_before_the_first_step(self, clone, name, value):
        done = self.measure(clone, **{name: value})
        assert done.returncode == 2 and f"measure_gpu.sh: {name}={value}: must be" in done.stderr

    def test_a_python_that_is_not_there_is_named(self, clone):
        done = self.measure(clone, PYTHON="/nowhere/python")
        assert (done.returncode, done.stderr) == (2, "measure_gpu.sh: there is no /nowhere/python: set PYTHON\n")

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [(["--fast"], "unknown option --fast"), (["gpu", "prefil"], "there is no step prefil: kernels select prefill")],
    )
    def test_a_wrong_argument_is_named(self, clone, arguments, sentence):
        done = self.measure(clone, *arguments)
        assert done.returncode == 2 and sentence in done.stderr

    def test_a_folder_that_cannot_be_written_to_is_named(self, clone):
        done = self.measure(clone, "/dev/null/gpu")
        assert (done.returncode, done.stderr) == (2, "measure_gpu.sh: /dev/null/gpu cannot be written to\n")

    def test_the_first_call_ends_within_eight_minutes(self, tmp_path):
        found = rehearse(tmp_path)
        assert found.done.returncode == 0, found.done.stderr
        assert [step["step"] for step in found.record] == ["kernels", "select", "prefill", "prefill-qwen"]
        assert sum(found.limits) <= 8 * 60

    def test_a_step_that_fails_is_reported_and_the_rest_goes_on(self, tmp_path):
        found = rehearse(tmp_path, "select", "prefill", "kernels", fails="1.5-7b")
        assert found.done.returncode == 1 and "== prefill: failed (1)" in found.done.stdout
        assert [step["status"] for step in found.record] == [0, 1, 0]
        assert (tmp_path / "results" / "prefill.log").read_text() == "as if it had run\n"

    def test_what_was_measured_is_not_measured_again(self, tmp_path):
        (tmp_path / "results" / "select").mkdir(parents=True)
        (tmp_path / "results" / "select" / "select.json").write_text("{}")
        found = rehearse(tmp_path, "select")
        assert (found.done.stdout, found.commands) == ("== select: measured before\n", [])


class TestBeforeSetUp:
    def test_help_is_there_at_once_from_any_folder_without_any_package(self, clone, tmp_path):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/bash\nexec "{sys.executable}" -S "$@"\n')
        python.chmod(0o755)
        done = bash(clone, str(clone / "run_OTPrune.sh"), "--help", cwd=tmp_path, PYTHON=str(python), PYTHONPATH="")
        assert done.returncode == 0, done.stderr
        assert "usage: run_OTPrune.sh" in done.stdout
        assert not (clone / ".venv").exists()

    @pytest.mark.parametrize("shell", ["sh", "bash"])
    @pytest.mark.parametrize("script", ["run_OTPrune.sh", "LLaVA/scripts/measure_gpu.sh"])
    def test_any_shell_and_a_link_will_do(self, clone, tmp_path, shell, script):
        link = tmp_path / "a link"
        link.symlink_to(clone / script)
        done = subprocess.run(
            [shutil.which(shell), str(link), "--help"],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "--num-processes" in done.stdout or "bash LLaVA/scripts/measure_gpu.sh [DIR" in done.stdout

    def test_a_wrong_value_fails_at_once(self, clone):
        done = bash(clone, "run_OTPrune.sh", "--ratio", "1.5")
        assert done.returncode == 2
        assert done.stderr == "run_OTPrune.sh: argument --ratio: must be a number with 0 < r <= 1, not 1.5\n"
        assert not (clone / ".venv").exists()


class TestPython:
    def test_that_is_too_old_is_refused(self, clone, tmp_path):
        old = tmp_path / "python-old"
        old.write_text("#!/bin/sh\nexit 1\n")
        old.chmod(0o755)
        done = set_up(clone, PYTHON=str(old))
        assert done.returncode == 1
        assert f"PYTHON={old} is not a Python >= 3.10." in done.stderr

    def test_that_is_missing_is_named_with_its_package(self, clone, tmp_path):
        tools = tmp_path / "bin"
        tools.mkdir()
        for name in ("bash", "dirname", "basename", "cat", "printf"):
            (tools / name).symlink_to(shutil.which(name))
        done = set_up(clone, PYTHON="", PATH=str(tools))
        assert done.returncode == 1
        assert "Python >= 3.10 is needed and none was found" in done.stderr
        assert "apt install python3 python3-venv" in done.stderr

    def test_without_venv_is_named_with_its_package(self, clone, tmp_path):
        bare = tmp_path / "python-bare"
        bare.write_text(f'#!/bin/bash\n[[ "$2" == *ensurepip* ]] && exit 1\nexec "{sys.executable}" "$@"\n')
        bare.chmod(0o755)
        done = set_up(clone, PYTHON=str(bare))
        assert done.returncode == 1
        assert "apt install python3-venv" in done.stderr


class TestSetUp:
    def test_installs_both_packages_with_the_tested_versions_once(self, prepared):
        done = set_up(prepared)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"ready: {prepared}/.venv/bin/python\n"
        calls = pip_calls(prepared)
        assert all(f"-c {prepared}/LLaVA/constraints.txt" in call for call in calls)
        assert f"-e {prepared}/LLaVA[train,figures,dev] -e {prepared}/lmms_eval" in calls[-1]
        assert set_up(prepared).returncode == 0
        assert pip_calls(prepared) == calls

    @pytest.mark.parametrize("name", ["LLaVA/pyproject.toml", "lmms_eval/pyproject.toml", "LLaVA/constraints.txt"])
    def test_is_done_again_when_what_it_installs_has_changed(self, prepared, name):
        set_up(prepared)
        calls = len(pip_calls(prepared))
        with (prepared / name).open("a") as file:
            file.write("# changed\n")
        assert set_up(prepared).returncode == 0
        assert len(pip_calls(prepared)) == 2 * calls

    def test_that_failed_says_so_and_is_done_again(self, prepared):
        done = set_up(prepared, PIP_STATUS="1")
        assert done.returncode == 1
        assert "could not be installed" in done.stderr
        calls = len(pip_calls(prepared))
        assert set_up(prepared).returncode == 0
        assert len(pip_calls(prepared)) > calls


class TestWithAnotherTransformers:
    def install(self, prepared, *arguments: str) -> str:
        """What pip is asked for after the set-up."""
        set_up(prepared)
        before = len(pip_calls(prepared))
        bash(prepared, "tests/run.sh", *arguments)
        (call,) = pip_calls(prepared)[before:]
        return call

    @pytest.mark.parametrize(
        ("wanted", "package"),
        [("oldest", f"transformers=={OLDEST}"), ("newest", "transformers"), ("5.20.1", "transformers==5.20.1")],
    )
    def test_it_is_installed_beside_the_environments_own(self, prepared, wanted, package):
        call = self.install(prepared, "--transformers", wanted)
        folder = f"{prepared}/.venv/transformers-{wanted}"
        assert call.endswith(f"--target {folder} {package}")
        constraints = Path(f"{folder}.txt").read_text().splitlines()
        assert "torch" in {line.split("==")[0] for line in constraints}
        assert not {"transformers", "huggingface-hub"} & {line.split("==")[0] for line in constraints}

    @pytest.mark.parametrize("wanted", ["latest", "../5.20", ""])
    def test_what_is_no_version_is_refused(self, prepared, wanted):
        done = bash(prepared, "tests/run.sh", "--transformers", wanted)
        assert done.returncode == 1
        assert f"takes oldest, newest or a version such as 5.24.0, not '{wanted}'" in done.stderr


def test_constraints_pin_exact_versions_and_name_no_place_to_get_them():
    lines = (ROOT / "LLaVA" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(pin.count("==") >= 1 and "://" not in pin and not pin.startswith("-") for pin in pins)
    names = {pin.split("==")[0] for pin in pins}
    assert {"torch", "transformers", "lmms-eval", "peft", "pytest", "ruff"} <= names
    assert not any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names)
