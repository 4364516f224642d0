"""Every command line answers what is wrong with one sentence and status 2, and spells shared options alike."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava import __main__ as llava
from llava.command import UNREAD, Parser, find_device, read_methods

IMAGE = ("--image", "no-such.png")
COUNTED = "flops --method"
TRAIN = "train --stage finetune --model m --data x.json --output o"

WRONG = {
    "nothing": "there is no command 'nothing'; allowed: ask, chat,",
    "ask --image x.png": "required: --query",
    "ask --image no-such.png --query What?": "no-such.png does not exist",
    "ask --image x.png --query What? --num_beams 0": "--num-beams: must be a whole number >= 1, not 0",
    "ask --image x.png --query What? --conv-mode v9": "unknown conversation mode 'v9'; allowed: default, v0",
    "ask --image x.png --query <image-placeholder><image-placeholder>": "places for 2 images, but 1 given",
    "ask --image x.png --query \udcff": "--query: must be UTF-8",
    "ask --image x.png --query What? --temperature nan": "--temperature: must be a number >= 0, not nan",
    "ask --image x.png --query What? --top-p 2": "--top-p: must be a number with 0 < r <= 1, not 2",
    "ask --image x.png --query What? --ratio \u0660.\u0665": "must be a number with 0 < r <= 1, not \u0660.\u0665",
    "chat --image x.png --temperature -1": "--temperature: must be a number >= 0, not -1",
    "chat --image x.png --temperature inf": "--temperature: must be a number >= 0, not inf",
    "chat --image-file no-such.png": "no-such.png does not exist",
    "chat --image x.png --max-new-tokens 0_1": "--max-new-tokens: must be a whole number >= 1, not 0_1",
    "methods --all": "unrecognized arguments: --all",
    "tokens": "required: --image",
    "tokens --image x.png --method nope": "unknown method 'nope'",
    "tokens --image x.png --method otprune:gamma=much": "otprune:gamma=much: OTPRUNE_GAMMA=much: must be a number",
    "tokens --image x.png --ratio 1.5": "--ratio: must be a number with 0 < r <= 1, not 1.5",
    "tokens --image x.png --device gpu": "--device: must be cpu, cuda or cuda:NUMBER, not 'gpu'",
    "tokens --image x.png --device cuda:99": "--device cuda:99: this machine has no such GPU",
    "tokens --image x.png --output /dev/null": "/dev/null is no folder",
    "tokens --image no-such.png": "no-such.png does not exist",
    "distances --image x.png --method otprun": "unknown method 'otprun'",
    "distances --image x.png --ratio 0": "--ratio: must be a number with 0 < r <= 1, not 0",
    "distances --image no-such.png --device cpu": "no-such.png does not exist",
    "flops --model /nowhere": "no checkpoint folder /nowhere",
    "flops --text -1": "--text: must be a whole number >= 0, not -1",
    "flops --visual 0": "--visual: must be a whole number >= 1, not 0",
    "flops --crops 1_0": "--crops: must be a whole number >= 1, not 1_0",
    "flops --ratio 0.1": "need a --method",
    "flops --benchmarks --text 9": "leave out --text",
    "flops --benchmarks --convention exact": "literature's convention, not exact",
    "flops --convention published": "invalid choice: 'published'",
    f"{COUNTED} nope --ratio 0.1": "unknown method 'nope'",
    f"{COUNTED} uniform": "a kept ratio is needed",
    f"{COUNTED} uniform,random --ratio 0.1": "--method takes one method here, not uniform,random",
    f"{COUNTED} uniform --ratio 0_1": "--ratio: must be a number with 0 < r <= 1, not 0_1",
    f"{COUNTED} uniform:layer=32:ratio=0.1": "32 layers, so 0 to 31 are allowed",
    f"{COUNTED} uniform --ratio 0.1 --layer -1": "0 <= L",
    f"{COUNTED} uniform --ratio 0.1 --layer 1_0": "LAYER_INDEX=1_0: must be a whole number",
    f"{COUNTED} otprune --ratio 0.1 --option gama=3": "no such option",
    f"{COUNTED} otprune:gamma --ratio 0.1": "an option reads name=value, not 'gamma'",
    f"{COUNTED} otprune:gamma=1:gamma=2 --ratio 0.1": "gamma is given twice",
    f"{COUNTED} prumerge:adaptive=1": "depends on the image",
    f"{COUNTED} uniform:budget=effective_rank:reference_rank=9 --ratio 0.1": "depends on the image",
    f"{COUNTED} uniform:budget=effective_rank --ratio 0.1": "needs reference_rank",
    f"{COUNTED} uniform:drop_duplicates=2 --ratio 0.1": "must be 1 or 0",
    "latency select --sizes 7": "a size is N:K",
    "latency select --method best": "unknown method 'best'",
    "latency select --device gpu": "--device: must be cpu, cuda or cuda:NUMBER, not 'gpu'",
    "latency prefill --ratio 0_1": "--ratio: must be a number with 0 < r <= 1, not 0_1",
    "latency prefill --methods fastv@two --device cpu": "NAME@LAYER, not 'fastv@two'",
    "latency prefill --model /nowhere --device cpu": "There is no checkpoint folder /nowhere",
    "latency generate --pope 5": "IMAGESxQUESTIONS, such as 500x18, not '5'",
    "latency generate --pope-one-by-one 5 --device cpu": "--pope-one-by-one is for the run that --pope asks for",
    "latency suite --dtype float16": "unrecognized arguments: --dtype float16",
    "table no-such-folder": "no-such-folder is no result folder: it has no results.json",
    "table --seed -1": "--seed: must be a whole number >= 0, not -1",
    "table --draws 0": "--draws: must be a whole number >= 1, not 0",
    "table --format xls": "invalid choice: 'xls'",
    "table --safe 1.5": "--safe: must be a number with 0 < r <= 1, not 1.5",
    "table --filter grey": "invalid choice: 'grey'",
    "table --filter downsample --safe 0.99": "not allowed with argument",
    "rank --images 0": "--images: must be a whole number >= 1, not 0",
    "figures": "required: NAME",
    "figures bars": "invalid choice: 'bars'",
    "figures time no-such-folder": "no-such-folder is no result folder",
    "figures time --output /dev/null": "/dev/null is no folder",
    "report no-such-folder --no-model": "no-such-folder is no result folder",
    "report --image no-such.png": "no-such.png does not exist",
    "fitprune fit --model-path": "expected one argument",
    "fitprune fit": "--reduction-ratio or --subset-ratio",
    "fitprune plot recipe.json": "invalid choice: 'plot'",
    "ocvtp extract --images no-such-folder": "no-such-folder",
    "train --stage finetune --model llava-mini --data no-such.json --output o": "no-such.json",
    "fitprune fit --subset-ratio 0.3 --seed -1": "--seed: must be a whole number >= 0, not -1",
    "scorer train --seed 1_0": "--seed: must be a whole number >= 0, not 1_0",
    "ocvtp train --epochs 0": "--epochs: must be a whole number >= 1, not 0",
    f"{TRAIN} --epochs inf": "--epochs: must be a number > 0, not inf",
    f"{TRAIN} --batch-size 0": "--batch-size: must be a whole number >= 1, not 0",
    f"{TRAIN} --accumulate -1": "--accumulate: must be a whole number >= 1, not -1",
    f"{TRAIN} --clip -1": "--clip: must be a number > 0, not -1",
    f"{TRAIN} --warmup 2": "--warmup: must be a number from 0 to 1, not 2",
    f"{TRAIN} --lora-alpha 8": "--lora-alpha goes with --lora-rank",
    f"{TRAIN} --stage pretrain --lora-rank 8": "--lora-rank is for finetune",
    f"{TRAIN} --seed 1": "--model m: there is no such checkpoint folder",
    "train --stage pretrain --model x --data x": "required: --output",
    "export llava-mini": "required: folder",
    "export llava-mini . --conv-mode v9": "is not empty",
}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """``llava ...`` as typed; returns the status and what was printed."""
    (tmp_path / "x.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)

    def typed(line: str):
        monkeypatch.setattr(sys, "argv", ["llava", *line.split(" ")])
        with pytest.raises(SystemExit) as ended:
            llava.main()
        return ended.value.code, capsys.readouterr()

    return typed


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_answered_with_one_sentence(run, line):
    status, said = run(line)
    command = line.split(" ", 1)[0]
    assert (status, said.out) == (2, "")
    assert said.err.count("\n") == 1 and said.err.startswith("llava: " if command == "nothing" else f"llava {command}")
    assert WRONG[line] in said.err


@pytest.mark.parametrize("command", llava.COMMANDS)
def test_shared_options_are_spelt_alike(run, command):
    status, said = run(f"{command} --help")
    assert status == 0 and f"usage: llava {command}" in said.out
    words = said.out.split()
    for option, also in (("--model", "--model-path"), ("--image", "--image-file")):
        assert (option in words) == (f"{also}" in words), option


def test_both_spellings_of_a_long_option_are_taken():
    parser = Parser("llava.eval.none")
    parser.add_argument("--max-new-tokens")
    assert parser.parse_args(["--max_new_tokens=3"]).max_new_tokens == "3"


def test_ctrl_c_ends_a_command_quietly(capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    assert Parser("llava.eval.none").run(interrupted, []) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["--help", "methods"])
def test_output_that_nobody_reads_ends_a_command_quietly(command):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        program = [sys.executable, "-u", "-m", "llava", command]
        done = subprocess.run(program, stdout=output, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b"" and done.returncode in (0, UNREAD)


def test_methods_are_read_with_their_options():
    first, second = read_methods("otprune:gamma=0.05, RANDOM:seed=1:ratio=0.2", 0.1, {}).values()
    assert (first.method, first.ratio, first.options["gamma"]) == ("otprune", 0.1, 0.05)
    assert (second.method, second.ratio, second.options["seed"]) == ("random", 0.2, 1)


def test_a_device_that_is_named_is_taken():
    assert find_device("cpu") == "cpu"


@pytest.mark.parametrize("name", llava.COMMANDS)
def test_every_command_is_a_module_that_runs(name):
    found = importlib.util.find_spec(llava.COMMANDS[name][0].partition(":")[0])
    if found.submodule_search_locations is not None:
        found = importlib.util.find_spec(f"{found.name}.__main__")
    assert 'if __name__ == "__main__":' in Path(found.origin).read_text()


def test_a_command_runs_as_its_module(run):
    status, said = run("methods")
    assert not status and "otprune\n    OTPrune, arXiv 2602.20205" in said.out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_all_commands(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llava", *arguments])
    llava.main()
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in llava.COMMANDS)
