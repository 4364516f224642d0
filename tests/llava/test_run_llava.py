"""One question about images: what ``eval_model`` hands to the model, and the command line around it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from golden import golden_root
from llava.eval import run_llava
from llava.mm_utils import process_images
from llava.model.tokenizer import load_tokenizer
from tiny_vlms import can_be_pruned

ROOT = golden_root() / "llava"
CASE = next(case for case in json.loads((ROOT / "manifest.json").read_text())["cases"] if case["kind"] == "eval_model")
CALLS = json.loads((ROOT / CASE["file"]).read_text())


class Stub:
    """A loader whose model writes down what it is given."""

    def __init__(self, config: dict, returned_ids, dtype: torch.dtype = torch.float16) -> None:
        self.config = SimpleNamespace(**config)
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.returned_ids = returned_ids
        self.processor = CLIPImageProcessorPil.from_pretrained(ROOT / CASE["processor"])
        self.loads, self.calls = [], []

    def load(self, *args, **kwargs):
        self.loads.append([list(args), kwargs])
        return load_tokenizer(ROOT / "checkpoints" / CASE["tokenizer"]), self, self.processor, 2048

    def generate(self, input_ids, **kwargs):
        self.calls.append({"input_ids": input_ids, **kwargs})
        return torch.tensor(self.returned_ids)


@pytest.fixture
def stub(monkeypatch):
    def install(config=None, returned_ids=((302, 923, 805, 299, 2),), **options):
        made = Stub(config or {"image_aspect_ratio": "pad"}, returned_ids, **options)
        monkeypatch.setattr(run_llava, "load_pretrained_model", made.load)
        monkeypatch.chdir(ROOT)
        return made

    return install


def arguments(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{**CALLS[0]["args"], **changes})


@pytest.mark.parametrize("call", [pytest.param(c, id=str(i)) for i, c in enumerate(CALLS) if "raises" not in c])
def test_calls_of_the_original(call, stub, capsys):
    made = stub(call["model_config"], call["generate_returned_ids"])
    args = SimpleNamespace(**call["args"])
    answer = run_llava.eval_model(args)

    assert made.loads == [call["load_args"]]
    (given,) = made.calls
    assert given.pop("input_ids").tolist() == call["input_ids"]
    images = given.pop("images")
    assert (list(images.shape), str(images.dtype)) == (call["images_shape"], call["images_dtype"])
    assert [list(size) for size in given.pop("image_sizes")] == call["image_sizes"]
    assert given == call["generate_kwargs"]
    assert args.conv_mode == call["conv_mode_used"]
    assert capsys.readouterr().out == call["stdout"]
    assert answer == call["stdout"].splitlines()[-1]


@pytest.mark.parametrize("call", [pytest.param(c, id=str(i)) for i, c in enumerate(CALLS) if "raises" in c])
def test_several_images_with_different_numbers_of_crops(call, stub):
    assert not call["strict"], "a defect of the original that is mended here"
    made = stub(call["model_config"])
    run_llava.eval_model(SimpleNamespace(**call["args"]))
    (given,) = made.calls
    files = call["args"]["image_file"].split(call["args"]["sep"])
    expected = process_images([Image.open(file) for file in files], made.processor, made.config)
    assert isinstance(given["images"], list)
    for image, reference in zip(given["images"], expected, strict=True):
        assert torch.equal(image, reference.half())
    assert (given["input_ids"] == -200).sum() == len(files)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_images_come_in_the_models_dtype(dtype, stub):
    made = stub(dtype=dtype)
    run_llava.eval_model(arguments())
    assert made.calls[0]["images"].dtype == dtype


def test_the_answer_is_stripped(stub, capsys):
    line_end, space = 13, 946
    stub(returned_ids=((space, space, 302, 923, line_end, space, 2),))
    answer = run_llava.eval_model(arguments())
    assert answer == answer.strip() != ""
    assert capsys.readouterr().out == answer + "\n"


def test_an_answer_of_a_v0_checkpoint_is_cut_where_the_users_next_turn_would_begin(stub):
    tokenizer = load_tokenizer(ROOT / "checkpoints" / CASE["tokenizer"])
    ids = tokenizer("Two cats. ###Human: How many?", add_special_tokens=False).input_ids
    stub(returned_ids=(ids,))
    assert run_llava.eval_model(arguments(conv_mode="llava_v0")) == "Two cats."


def test_surplus_images_are_named(stub, caplog):
    made = stub()
    run_llava.eval_model(arguments(image_file="images/im2_97x61.png,images/im5_61x250.png"))
    assert len(made.calls[0]["images"]) == 2
    assert "2 images, but the query has a place for 1 only" in caplog.text


def test_more_places_than_images_are_left_to_the_model(stub):
    """As in the original; which number of images it takes is for the model behind the loader to say."""
    made = stub()
    run_llava.eval_model(arguments(query="<image-placeholder> or <image-placeholder>?"))
    run_llava.eval_model(arguments(query="<image>\nWhat is it?"))
    assert [(call["input_ids"] == -200).sum().item() for call in made.calls] == [2, 2]
    assert [len(call["images"]) for call in made.calls] == [1, 1]


def run(*options: str) -> int:
    return run_llava.main([*options, "--model-path", "x/llava-v1.5-7b", "--query", "What?"])


def write_cut(path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("missing.png", lambda path: None, "missing.png does not exist"),
        ("cut.png", write_cut, "cut.png is truncated or damaged"),
        ("note.txt", lambda path: path.write_text("hello"), "note.txt is not an image"),
        ("folder", lambda path: path.mkdir(), "folder is a folder"),
    ],
)
def test_a_bad_image_is_one_sentence_and_a_non_zero_exit_before_loading(name, write, message, stub, tmp_path, capsys):
    made = stub()
    write(tmp_path / name)
    assert run("--image-file", str(tmp_path / name)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("python -m llava.eval.run_llava: ") and captured.err.count("\n") == 1
    assert made.loads == []


def test_a_model_without_vision_is_one_sentence(stub, capsys):
    stub().processor = None
    assert run("--image-file", "images/im2_97x61.png") == 2
    assert (
        "x/llava-v1.5-7b is a language model without vision: give a LLaVA, such as llava-mini"
        in capsys.readouterr().err
    )


SAMPLING = ("do_sample", "temperature", "top_p", "num_beams", "max_new_tokens")


def test_the_defaults_of_the_command_line(stub):
    made = stub()
    assert run("--image-file", "images/im2_97x61.png") == 0
    assert made.loads == [[["x/llava-v1.5-7b", None, "llava-v1.5-7b"], {"device": "cuda"}]]
    assert [made.calls[0][key] for key in SAMPLING] == [True, 0.2, None, 1, 512]


def test_the_options_of_the_command_line(stub):
    made = stub()
    options = [
        *("--model-path", "x/llava-v1.6-lora", "--model-base", "x/base", "--sep", ";"),
        *("--image-file", "images/im2_97x61.png;images/im5_61x250.png"),
        *("--query", "<image-placeholder><image-placeholder>Which?", "--conv-mode", "vicuna_v1"),
        *("--temperature", "0", "--top_p", "0.5", "--num_beams", "2", "--max_new_tokens", "9", "--device", "cpu"),
    ]
    assert run_llava.main(options) == 0
    assert made.loads == [[["x/llava-v1.6-lora", "x/base", "llava-v1.6-lora"], {"device": "cpu"}]]
    assert [made.calls[0][key] for key in SAMPLING] == [False, 0.0, 0.5, 2, 9]
    assert made.calls[0]["image_sizes"] == [(97, 61), (61, 250)]


def test_importing_the_package_or_the_utilities_does_not_import_a_model():
    script = (
        "import sys, llava, llava.constants, llava.conversation, llava.utils, llava.mm_utils; "
        "heavy = ('llava.model', 'transformers.models.llama', 'requests', 'torchvision', 'peft', 'flash_attn'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("name", ["llava-v1.5-tiny", "llava-v1.6-vicuna-tiny"])
def test_a_real_checkpoint_answers(name, monkeypatch, capsys):
    if not (ROOT / "checkpoints" / name / "config.json").exists():
        pytest.skip(f"the small copy of the golden data has no {name}")
    monkeypatch.chdir(ROOT)
    code = run_llava.main(
        [
            *("--model-path", f"checkpoints/{name}"),
            *("--image-file", "images/im0_640x427.png,images/im4_1001x301.png"),
            *("--query", "<image-placeholder><image-placeholder>\nWhich one is the largest?"),
            *("--temperature", "0", "--max_new_tokens", "4", "--device", "cpu"),
        ]
    )
    assert code == 0
    assert capsys.readouterr().out.strip()


@can_be_pruned
def test_one_command_for_both_kinds_of_models_and_any_method(capsys):
    """llava-mini in LLaVA's own format and in transformers' gives one answer, and keeps the same number of tokens."""
    image = str(Path(__file__).parents[2] / "LLaVA" / "docs" / "scene.png")
    said = []
    for model in ("llava-mini", "llava-mini-hf"):
        options = ["--model-path", model, "--image-file", image, "--query", "Is there a red triangle?"]
        assert run_llava.main([*options, "--temperature", "0", "--method", "otprune", "--device", "cpu"]) == 0
        captured = capsys.readouterr()
        said.append((captured.out, captured.err.splitlines()[-1]))
    assert said == [("yes\n", "otprune: 56 of 576 visual tokens kept")] * 2


def test_parts_of_a_question_follow_its_places():
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    mark = "<image-placeholder>"
    assert run_llava._content("What?", [red, blue]) == [red, "What?"]
    assert run_llava._content(f"{mark} or {mark}?", [red, blue]) == [red, " or ", blue, "?"]


def test_a_place_without_an_image_is_an_error_in_a_model_of_transformers_too():
    """What stands after such a place would be lost."""
    settings = {"model_base": None, "conv_mode": None, "sep": ",", "temperature": 0, "top_p": None, "num_beams": 1}
    mark = "<image-placeholder>"
    args = SimpleNamespace(
        model_path="llava-mini-hf",
        image_file=str(ROOT / "images/im2_97x61.png"),
        query=f"{mark} or {mark}?",
        max_new_tokens=1,
        **settings,
    )
    with pytest.raises(IndexError, match="places for 2 images, but 1 given"):
        run_llava.eval_model(args)


@pytest.mark.parametrize("option", [["--conv-mode", "vicuna_v1"], ["--model-base", "x/base"]])
def test_what_only_llavas_own_checkpoints_have_is_refused_for_others(option, capsys):
    given = ["--model-path", "llava-mini-hf", "--image-file", str(ROOT / "images/im2_97x61.png"), "--query", "What?"]
    assert run_llava.main([*given, *option]) == 2
    assert f"{option[0]} is for LLaVA's own checkpoints" in capsys.readouterr().err
