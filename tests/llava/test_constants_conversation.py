"""Constants and conversation templates: to the character what the published checkpoints were trained with."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from types import SimpleNamespace

import pytest
from PIL import Image

from golden import golden_root
from llava import constants, conversation
from llava.conversation import (
    Conversation,
    SeparatorStyle,
    benchmark_conv_mode,
    choose_conv_mode,
    conv_mode_for,
    conv_templates,
    image_mark,
)

ROOT = golden_root() / "llava"
GOLDEN = json.loads((ROOT / "conversation/prompts.json").read_text())
IMAGES = json.loads((ROOT / "manifest.json").read_text())["images"]


def image(name: str) -> Image.Image:
    return Image.open(ROOT / "images" / IMAGES[name])


def converse(case: dict) -> Conversation:
    conv = conv_templates[case["template"]].copy()
    if case["system"] is not None:
        conv.system = case["system"]
    for who, message in case["messages"]:
        if isinstance(message, list):
            message = (message[0], image(message[1]), message[2])
        conv.append_message(conv.roles[0 if who == "u" else 1], message)
    return conv


def case_id(case: dict) -> str:
    system = "" if case["system"] is None else "-own_system" if case["system"] else "-no_system"
    return f"{case['template']}-{case['dialog']}{system}"


def test_constants_are_those_of_the_original():
    expected = json.loads((ROOT / "mm_utils/constants.json").read_text())
    assert {name: getattr(constants, name) for name in expected} == expected


def test_separator_styles_have_the_original_numbers():
    assert {style.name: style.value for style in SeparatorStyle} == GOLDEN["separator_styles"]


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_template_fields(name):
    expected = GOLDEN["templates"][name]
    template = conv_templates[name]
    assert template.sep_style.name == expected["sep_style"]
    assert isinstance(template.messages, tuple)
    assert json.loads(json.dumps([template.roles, template.messages])) == [expected["roles"], expected["messages"]]
    for field in ("system", "offset", "sep", "sep2", "version", "skip_next"):
        assert getattr(template, field) == expected[field]
    assert template.get_prompt() == expected["template_prompt"]


def test_no_template_is_missing_or_extra():
    assert list(conv_templates) == list(GOLDEN["templates"])


def test_aliases_are_one_object():
    for names in GOLDEN["aliases"]:
        assert len({id(conv_templates[name]) for name in names}) == 1
    assert len({id(template) for template in conv_templates.values()}) == len(GOLDEN["aliases"])
    assert all(conversation.default_conversation is conv_templates[name] for name in GOLDEN["default_conversation"])


@pytest.mark.parametrize("name", GOLDEN["module_names"])
def test_templates_are_importable_by_name(name):
    assert getattr(conversation, name) in conv_templates.values()


@pytest.mark.parametrize("case", [pytest.param(case, id=case_id(case)) for case in GOLDEN["prompts"]])
def test_prompt(case):
    conv = converse(case)
    if "raises" in case:
        with pytest.raises(Exception) as caught:
            conv.get_prompt()
        assert caught.type.__name__ == case["raises"]
    else:
        assert conv.get_prompt() == case["prompt"]
        assert conv.get_prompt() == case["prompt"], "writing the prompt must not change the conversation"


@pytest.mark.parametrize(
    ("template", "turn"),
    [("vicuna_v1", "USER:  "), ("llava_v0", "Human: ###"), ("llava_llama_2", "<s>[INST]  [/INST]"), ("plain", "\n")],
)
def test_an_image_without_words_is_a_turn_and_not_an_invitation_to_the_model(template, turn):
    conv = conv_templates[template].copy()
    conv.append_message(conv.roles[0], "What is it?")
    conv.append_message(conv.roles[1], None)
    before = conv.get_prompt()
    conv.append_message(conv.roles[0], ("", Image.new("RGB", (4, 4)), "Default"))
    assert conv.get_prompt() == before + turn


@pytest.mark.parametrize("case", [pytest.param(case, id=case_id(case)) for case in GOLDEN["prompts"] if "dict" in case])
def test_images_log_and_chatbot(case):
    conv = converse(case)
    assert [list(picture.size) for picture in conv.get_images(return_pil=True)] == case["image_sizes"]
    assert json.loads(json.dumps(conv.dict())) == case["dict"]
    pairs = [
        [text and re.sub(r';base64,[^"]+" alt=', ";...", text) for text in pair] for pair in conv.to_gradio_chatbot()
    ]
    assert pairs == case["chatbot"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=f"{c['image']}-{c['mode']}-{c['kwargs'].get('max_len', 1344)}")
        for c in GOLDEN["process_image"]
    ],
)
def test_process_image(case):
    picture = image(case["image"])
    result = conversation.default_conversation.process_image(picture, case["mode"], return_pil=True, **case["kwargs"])
    assert list(result.size) == case["size"]
    if "sha256" in case:
        assert hashlib.sha256(result.convert("RGB").tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("size", [(20000, 2), (2, 20000), (1345, 1)], ids=str)
def test_process_image_shrinks_an_image_of_any_shape(monkeypatch, size):
    if max(size) == 20000:
        monkeypatch.setattr("llava.images.expand2square", lambda *_: pytest.fail("a canvas of 1.6 GB is built"))
    picture = Image.new("RGB", size, (200, 30, 90))
    found = {mode: converted(picture, mode).size for mode in ("Default", "Crop", "Pad", "Resize")}
    thin = (1344, 1) if size[0] > size[1] else (1, 1344)
    assert found == {"Default": thin, "Crop": thin, "Pad": (672, 672), "Resize": (336, 336)}


def converted(picture: Image.Image, mode: str) -> Image.Image:
    return conversation.default_conversation.process_image(picture, mode, return_pil=True)


def test_process_image_encodes_png_by_default():
    picture = Image.new("RGB", (5, 3), (1, 2, 3))
    text = conversation.default_conversation.process_image(picture, "Default")
    decoded = Image.open(io.BytesIO(base64.b64decode(text)))
    assert (decoded.format, decoded.size, decoded.getpixel((0, 0))) == ("PNG", (5, 3), (1, 2, 3))


def test_an_image_with_transparency_can_be_shown_in_the_chatbot():
    conv = conv_templates["vicuna_v1"].copy()
    conv.append_message("USER", ("what?", Image.new("RGBA", (4, 4)), "Default"))
    assert conv.to_gradio_chatbot()[0][0].startswith('<img src="data:image/jpeg;base64,')


def test_process_image_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match=r"'Squash'.*'Pad'"):
        conversation.default_conversation.process_image(Image.new("RGB", (2, 2)), "Squash")


def test_a_copy_is_independent_and_can_be_written_into():
    conv = conv_templates["v0"].copy()
    conv.messages[1][1] = "changed"
    conv.messages[-1][-1] = "changed again"
    conv.append_message("Human", "new")
    assert conv.skip_next is False
    assert len(conv_templates["v0"].messages) == 2
    assert "changed" not in conv_templates["v0"].get_prompt()


def test_a_template_refuses_new_messages():
    with pytest.raises(AttributeError):
        conv_templates["vicuna_v1"].append_message("USER", "hello")


def test_an_unknown_style_is_named():
    conv = conv_templates["vicuna_v1"].copy()
    conv.sep_style = "THREE"
    with pytest.raises(ValueError, match="'THREE'"):
        conv.get_prompt()


@pytest.mark.parametrize(
    ("model_name", "mode"),
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("llava-v1.6-vicuna-13b", "llava_v1"),
        ("LLaVA-v1.6-Mistral-7B", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-llama-2-7b-chat-v1", "llava_llama_2"),
        ("llava-mpt-7b", "mpt"),
        ("llava-7b-delta", "llava_v0"),
    ],
)
def test_the_name_of_a_checkpoint_chooses_the_template(model_name, mode):
    assert conv_mode_for(model_name) == mode


@pytest.mark.parametrize(
    ("model_name", "config", "mode"),
    [
        ("my-finetune", {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}, "llava_v1"),
        ("my-finetune", {"model_type": "llava_llama", "mm_projector_type": "linear"}, "llava_v0"),
        ("my-finetune", {"model_type": "llava_mistral", "mm_projector_type": "mlp2x_gelu"}, "mistral_instruct"),
        ("my-finetune", {"model_type": "llava", "architectures": ["LlavaMistralForCausalLM"]}, "mistral_instruct"),
        ("prompt-tuned-7b", {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}, "llava_v1"),
        ("like-mistral-v1", {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "llava_v1"),
        ("llava-llama-2-7b", {"model_type": "llava_llama"}, "llava_llama_2"),
        ("llava-v1.5-7b", {"model_type": "llava_llama", "conv_template": "plain"}, "plain"),
    ],
)
def test_the_files_of_a_checkpoint_are_asked_before_its_name(model_name, config, mode):
    assert conv_mode_for(model_name, SimpleNamespace(**config)) == mode


def test_a_tokenizer_that_ends_turns_as_chatml_chooses_it():
    assert conv_mode_for("my-finetune", SimpleNamespace(), SimpleNamespace(eos_token="<|im_end|>")) == "chatml_direct"


def test_benchmarks_ask_the_v1_family_in_the_template_of_its_training():
    tokenizer = SimpleNamespace(eos_token="</s>")
    assert benchmark_conv_mode("llava-v1.5-7b", SimpleNamespace(), tokenizer) == "vicuna_v1"
    assert benchmark_conv_mode("llava-7b-delta", SimpleNamespace(), tokenizer) == "llava_v0"


def test_a_wanted_template_wins_and_a_surprising_one_is_announced(capsys):
    assert choose_conv_mode("llava-v1.5-7b", "llava_v1") == "llava_v1"
    assert capsys.readouterr().out == ""
    assert choose_conv_mode("llava-v1.5-7b", "mpt") == "mpt"
    assert capsys.readouterr().out == (
        "[WARNING] the auto inferred conversation mode is llava_v1, while `--conv-mode` is mpt, using mpt\n"
    )


def test_an_unknown_template_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'vicuna_v9'.*vicuna_v1"):
        choose_conv_mode("llava-v1.5-7b", "vicuna_v9")


def test_image_mark_follows_the_configuration():
    assert image_mark(SimpleNamespace()) == "<image>"
    assert image_mark(SimpleNamespace(mm_use_im_start_end=True)) == "<im_start><image><im_end>"
