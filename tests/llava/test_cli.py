"""The conversation on the command line: prompts, history, streaming, errors."""

from __future__ import annotations

import ast
import builtins
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPImageProcessorPil

from golden import golden_root
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.tokenizer import load_tokenizer
from llava.serve import cli

ROOT = golden_root() / "llava"
TOKENIZER = ROOT / "checkpoints/llava-v1.5-tiny"
PROCESSOR = ROOT / "openai/clip-vit-tiny-patch14-56"


class Stub:
    """A loader whose model streams a fixed answer and writes down what it was asked."""

    def __init__(self, answer: str, config: dict) -> None:
        self.tokenizer = load_tokenizer(TOKENIZER)
        self.config = SimpleNamespace(**config)
        self.device, self.dtype = torch.device("cpu"), torch.bfloat16
        self.answer = [*self.tokenizer(answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        self.loads, self.calls = [], []

    def load(self, *args, **kwargs):
        self.loads.append([list(args), kwargs])
        return self.tokenizer, self, CLIPImageProcessorPil.from_pretrained(PROCESSOR), 2048

    def generate(self, input_ids, streamer, **kwargs):
        self.calls.append({"input_ids": input_ids, **kwargs})
        # What transformers does when the prompt is given as embeddings: the prompt it streams is empty.
        streamer.put(torch.zeros(1, 0, dtype=torch.long))
        for token in self.answer:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.tensor([self.answer])


@pytest.fixture
def talk(monkeypatch):
    """Run the conversation with the given questions; return the stub and what was asked for."""

    def run(*questions, options=(), config=None, answer="There are seven bicycles.", model="x/llava-v1.5-7b"):
        made = Stub(answer, config or {"image_aspect_ratio": "pad"})
        made.asked = []
        waiting = iter(questions)

        def ask(prompt=""):
            made.asked.append(prompt)
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", ask)
        monkeypatch.setattr(cli, "load_pretrained_model", made.load)
        monkeypatch.chdir(ROOT)
        image = [] if "--image-file" in options else ["--image-file", "images/im2_97x61.png"]
        made.code = cli.run(["--model-path", model, *image, *options])
        return made

    return run


def expected_ids(made: Stub, template: str, *messages: str | None) -> list[int]:
    conv = conv_templates[template].copy()
    for index, message in enumerate(messages):
        conv.append_message(conv.roles[index % 2], message)
    return tokenizer_image_token(conv.get_prompt(), made.tokenizer)


def test_answers_are_streamed_and_become_part_of_the_next_prompt(talk, capsys):
    made = talk("What is it?", "How many?")
    assert made.code == 0
    answer = "There are seven bicycles."
    first, second = made.calls
    assert first["input_ids"].tolist() == [expected_ids(made, "llava_v1", "<image>\nWhat is it?", None)]
    history = ("<image>\nWhat is it?", answer, "How many?", None)
    assert second["input_ids"].tolist() == [expected_ids(made, "llava_v1", *history)]
    assert made.asked == ["USER: "] * 3
    assert capsys.readouterr().out == f"ASSISTANT: {answer}\nASSISTANT: {answer}\nexit...\n"


def test_every_turn_has_the_image(talk):
    made = talk("What is it?", "How many?")
    for call in made.calls:
        assert call["images"].shape == (1, 3, 56, 56) and call["images"].dtype == torch.bfloat16
        assert call["image_sizes"] == [(97, 61)]


def test_the_end_of_an_answer_is_marked_once(talk, capsys):
    made = talk("What is it?", "How many?", options=["--debug"])
    assert "</s></s>" not in capsys.readouterr().out
    assert made.calls[1]["input_ids"].tolist()[0].count(made.tokenizer.eos_token_id) == 1


def test_what_is_not_utf_8_is_asked_for_again(talk, capsys):
    made = talk("What is \udcff?", "What is it?")
    assert made.code == 0 and len(made.calls) == 1
    assert "that was not UTF-8: please type it again" in capsys.readouterr().out


def test_a_mark_is_not_typed_and_the_conversation_goes_on(talk, capsys):
    made = talk("What about <image>?", "What is it?")
    assert made.code == 0 and len(made.calls) == 1
    assert made.calls[0]["input_ids"].tolist() == [expected_ids(made, "llava_v1", "<image>\nWhat is it?", None)]
    assert "<image> stands for the image, which is shown already" in capsys.readouterr().out


def test_a_mark_that_the_model_writes_is_no_second_image(talk):
    made = talk("What is it?", "How many?", answer="An <image> of bicycles.")
    assert [(call["input_ids"] == -200).sum() for call in made.calls] == [1, 1]


def test_a_model_without_vision_is_one_sentence(talk, monkeypatch, capsys):
    class Plain(Stub):
        def load(self, *args, **kwargs):
            tokenizer, model, _, context = super().load(*args, **kwargs)
            return tokenizer, model, None, context

    monkeypatch.setattr(sys.modules[__name__], "Stub", Plain)
    assert talk("What is it?").code == 2
    assert (
        "x/llava-v1.5-7b is a language model without vision: give a LLaVA, such as llava-mini"
        in capsys.readouterr().err
    )


def test_without_a_name_the_embedded_model_talks():
    assert cli.parse_args(["--image-file", "a.png"]).model_path == "llava-mini"


def test_an_empty_line_ends_the_conversation(talk, capsys):
    made = talk("", "never asked")
    assert made.calls == []
    assert capsys.readouterr().out == "exit...\n"


def test_an_input_that_is_closed_ends_it_too(talk, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert talk("never asked").calls == []
    assert capsys.readouterr().out == "exit...\n"


def test_control_c_ends_it_too(talk, monkeypatch):
    class Interrupted(Stub):
        def generate(self, *args, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[__name__], "Stub", Interrupted)
    assert talk("What is it?").code == 130


def test_anyres_crops_are_handed_over(talk):
    grid = [[56, 112], [112, 56], [112, 112]]
    made = talk("What?", config={"image_aspect_ratio": "anyres", "image_grid_pinpoints": grid})
    assert made.calls[0]["images"].ndim == 5


def test_first_generation_marks(talk):
    made = talk("What?", config={"mm_use_im_start_end": True})
    expected = expected_ids(made, "llava_v1", "<im_start><image><im_end>\nWhat?", None)
    assert made.calls[0]["input_ids"].tolist() == [expected]


def test_mpt_names_are_readable(talk):
    made = talk("What?", model="x/llava-mpt-7b")
    assert made.asked[0] == "user: "
    assert made.calls[0]["input_ids"].tolist() == [expected_ids(made, "mpt", "<image>\nWhat?", None)]


def test_defaults(talk):
    made = talk("What?")
    assert made.loads == [[["x/llava-v1.5-7b", None, "llava-v1.5-7b", False, False], {"device": "cuda"}]]
    kept = {key: made.calls[0][key] for key in ("do_sample", "temperature", "max_new_tokens", "use_cache")}
    assert kept == {"do_sample": True, "temperature": 0.2, "max_new_tokens": 512, "use_cache": True}


def test_options(talk, capsys):
    made = talk(
        "What?",
        options=[
            *("--model-base", "x/base", "--device", "cpu", "--conv-mode", "vicuna_v1"),
            *("--temperature", "0", "--max-new-tokens", "7", "--load-4bit"),
        ],
    )
    assert made.loads == [[["x/llava-v1.5-7b", "x/base", "llava-v1.5-7b", False, True], {"device": "cpu"}]]
    assert made.calls[0]["input_ids"].tolist() == [expected_ids(made, "vicuna_v1", "<image>\nWhat?", None)]
    assert (made.calls[0]["do_sample"], made.calls[0]["max_new_tokens"]) == (False, 7)
    assert capsys.readouterr().out.startswith("[WARNING] the auto inferred conversation mode is llava_v1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-file", "images/none.png"], "images/none.png does not exist"),
        (["--image-file", "manifest.json"], "manifest.json is not an image"),
        (["--conv-mode", "v9"], "unknown conversation mode 'v9'; allowed: default"),
    ],
    ids=["missing", "no picture", "template"],
)
def test_a_bad_request_is_one_sentence_and_a_non_zero_exit_before_loading(talk, capsys, options, message):
    made = talk("What?", options=options)
    captured = capsys.readouterr()
    assert made.code == 2 and made.loads == []
    assert message in captured.err
    assert captured.err.startswith("python -m llava.serve.cli: ") and captured.err.count("\n") == 1


def test_a_real_checkpoint_streams_what_it_returns(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    questions = iter(["What is shown in the image?", "How many?", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(questions))
    code = cli.run(
        [
            *("--model-path", "checkpoints/llava-v1.5-tiny", "--image-file", "images/im2_97x61.png"),
            *("--device", "cpu", "--temperature", "0", "--max-new-tokens", "5", "--debug"),
        ]
    )
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    streamed = [line.removeprefix("ASSISTANT: ").strip() for line in lines if line.startswith("ASSISTANT: ")]
    logged = [ast.literal_eval(line.strip())["outputs"] for line in lines if "'outputs'" in line]
    assert len(streamed) == 2 and streamed == logged


def test_an_answer_of_a_v0_checkpoint_ends_where_the_users_next_turn_would_begin(talk, capsys):
    made = talk("What?", "And?", answer="Two cats.###", options=["--conv-mode", "llava_v0"])
    assert [
        (type(criteria).__name__, criteria.keywords) for call in made.calls for criteria in call["stopping_criteria"]
    ] == [("KeywordsStoppingCriteria", ["###"])] * 2
    expected = expected_ids(made, "llava_v0", "<image>\nWhat?", "Two cats.", "And?", None)
    assert made.calls[1]["input_ids"].tolist() == [expected]
    assert "Two cats.\n" in capsys.readouterr().out
