"""How the distribution sits beside the released lmms-eval, and the command lines that users of OTPrune know."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import lmms_eval
import pytest
from lmms_eval.models import get_model
from lmms_eval_otprune import manifests
from lmms_eval_otprune.models import command_line, exit_status
from lmms_eval_otprune.models.llava import Llava
from loguru import logger

from llava.eval.latency import suite

ROOT = Path(__file__).parents[2]


class TestPackages:
    def test_the_folder_lmms_eval_is_no_package(self):
        assert not (ROOT / "lmms_eval" / "__init__.py").exists()

    def test_the_released_framework_is_found_from_the_repository_s_root(self, run):
        status, printed = run(ROOT, ["lmms_eval", "--help"])
        assert status == 0, printed
        assert "Run model evaluation" in printed

    def test_the_model_id_llava_is_ours(self):
        assert manifests()[0].model_id == "llava"
        assert get_model("llava") is Llava


class TestCommandLine:
    """What lmms-eval would fail on much later, or pass over."""

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--output_path", "a,b"], "--output_path a,b: lmms-eval cannot write"),
            (["--output_path=a,b"], "--output_path a,b: lmms-eval cannot write"),
            (["--num_fewshot", "1"], "--num_fewshot 1: llava is asked without examples"),
            (
                ["--model_args", "pretrained=llava-mini,resume_dir=a,b"],
                "--model_args .*: must read name=value,name=value",
            ),
            (["--gen_kwargs", "top_k=5"], "--gen_kwargs top_k=5: has no effect here, only max_new_tokens, "),
            (["--gen_kwargs", "until=x"], "--gen_kwargs until=x: has no effect here"),
            (
                ["--gen_kwargs", "do_sample=True"],
                "--gen_kwargs do_sample=True: llava samples where temperature is above 0",
            ),
            (["--gen_kwargs", "top_p=0.5"], "llava samples where temperature is above 0"),
            (["--gen_kwargs", "num_beams=0"], "num_beams=0 must be a whole number >= 1"),
            (["--gen_kwargs", "max_new_tokens=1.5"], "max_new_tokens=1.5 must be a whole number >= 1"),
            (["--gen_kwargs", "temperature=-1"], "temperature=-1.0 must be a number >= 0"),
            (["--gen_kwargs", "temperature=nan"], "temperature=nan must be a number >= 0"),
            (["--gen_kwargs", "temperature=1,top_p=1.5"], "top_p=1.5 must be a number with 0 <= p <= 1"),
        ],
    )
    def test_is_refused_in_one_sentence(self, arguments, sentence):
        with pytest.raises(ValueError, match=sentence):
            command_line.check(arguments)

    def test_is_looked_at_before_anything_is_loaded(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lmms_eval.__main__", sys)
        monkeypatch.setattr("sys.argv", ["lmms_eval", "--model", "llava", "--gen_kwargs", "top_k=5"])
        monkeypatch.setattr("lmms_eval_otprune.models.exit_status.fail_loudly", lambda: None)
        with pytest.raises(SystemExit, match=r"^llava: --gen_kwargs top_k=5: has no effect here"):
            manifests()

    def test_with_what_has_an_effect_is_left_alone(self):
        command_line.check(["--num_fewshot", "0", "--output_path", "logs", "--gen_kwargs", "temperature=0,num_beams=2"])
        command_line.check(["--gen_kwargs", "do_sample=True,temperature=0.2,top_p=0.9", "--limit", "2"])
        command_line.check([])


class TestExitStatus:
    @pytest.mark.parametrize("beginning", exit_status.FAILURES)
    def test_a_failure_that_lmms_eval_logs_ends_with_status_1(self, beginning, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "lmms_eval.__main__", sys)
        exit_status.fail_loudly()
        try:
            with pytest.raises(SystemExit) as ended:
                logger.error(f"{beginning}: LocalTokenNotFoundError")
        finally:
            logger.configure(patcher=lambda record: None)
        assert ended.value.code == 1
        assert "otprune_paper" in capsys.readouterr().err

    @pytest.mark.parametrize("beginning", exit_status.FAILURES)
    def test_lmms_eval_still_logs_failures_in_these_words(self, beginning):
        package = Path(lmms_eval.__file__).parent
        assert any(beginning in path.read_text() for path in (*package.glob("*.py"), *package.glob("loggers/*.py")))


class TestCommand:
    """``python -m lmms_eval --model llava``, started as OTPrune's users start it."""

    @pytest.fixture
    def arguments(self, tiny_checkpoint) -> Callable[..., list[str]]:
        def build(tasks: str, *more: str) -> list[str]:
            model = ["--model", "llava", "--model_args", f"pretrained={tiny_checkpoint()}"]
            return ["lmms_eval", *model, "--tasks", tasks, "--batch_size", "1", *more]

        return build

    def test_evaluates_the_builtin_task_with_our_model(self, workplace, run, arguments):
        switch = {"BASELINE": "OURS", "LAYER_INDEX": "0", "SUBSET_RATIO": "0.5"}
        launch = ["accelerate.commands.launch", "--num_processes=1", "-m"]
        output = ["--log_samples", "--output_path", "logs"]
        status, printed = run(workplace, [*launch, *arguments("pope", *output)], **switch)
        assert status == 0, printed
        [path] = (workplace / "logs").glob("*/*_results.json")
        results = json.loads(path.read_text())
        assert results["config"]["model_backend"] == "lmms_eval_otprune.models.llava.Llava (simple)"
        assert "pope_f1_score,none" in results["results"]["pope"]
        assert results["throughput"]["avg_kept_visual_tokens"] == 8 * 8
        assert results["throughput"]["avg_visual_tokens"] == 8 * 16
        assert results["throughput"]["avg_visual_tokens_from_layer_0"] == 8
        assert 0 < results["throughput"]["avg_flops_ratio_literature"] < 1
        assert printed.count("otprune keeps 50 %") == 1
        assert "8 of 16 visual tokens an image, prefill FLOPs " in printed

    def test_ends_with_one_sentence_when_the_switch_is_wrong(self, workplace, run, arguments):
        status, printed = run(workplace, arguments("pope"), BASELINE="OURS", SUBSET_RATIO="1.5")
        assert status == 1
        assert printed.splitlines()[-1] == "llava: SUBSET_RATIO=1.5: must be a number with 0 < r <= 1"
        assert "Traceback" not in printed

    def test_is_what_the_measurement_of_speed_starts(self, tiny_checkpoint, tmp_path):
        arguments = f"pretrained={tiny_checkpoint()},device=cpu,visual_cache={2**20}"
        found = suite.run_tasks(
            arguments, ["mini_pope"], 2, 4, tmp_path, {"BASELINE": "OTPRUNE", "SUBSET_RATIO": "0.5"}
        )
        assert found["samples_per_second"] > 0
        assert found["hits"] + found["misses"] == 4
