"""LLaVA-format conversations become tokens and labels, and a projector, a model or adapters are trained on them."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlamaConfig, LlamaForCausalLM

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.prompt import assign_images
from llava.model.tokenizer import load_tokenizer
from llava.train import train
from llava.train.data import (
    Collator,
    ConversationDataset,
    find_faults,
    read_entries,
    tokenize_conversation,
)
from weight_names import weight_names

TURNS = [
    {"from": "human", "value": "What is this?\n<image>"},
    {"from": "gpt", "value": "A red star."},
    {"from": "human", "value": "And its color?"},
    {"from": "gpt", "value": "red"},
]


@pytest.fixture(scope="module")
def tokenizer(golden_llava):
    return load_tokenizer(golden_llava / "checkpoints" / "llava-v1.5-tiny")


def labelled_text(input_ids, labels, tokenizer):
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


def test_v1_tokens_are_those_of_the_prompt_that_inference_builds(tokenizer):
    input_ids, _ = tokenize_conversation(TURNS, tokenizer, "v1")

    conversation = conv_templates["vicuna_v1"].copy()
    for role, text in zip("0101", ("<image>\nWhat is this?", "A red star.", "And its color?", "red"), strict=True):
        conversation.append_message(conversation.roles[int(role)], text)
    assert input_ids == tokenizer_image_token(conversation.get_prompt(), tokenizer)
    assert input_ids.count(IMAGE_TOKEN_INDEX) == 1


def test_v1_labels_are_the_answers_with_their_ends(tokenizer):
    input_ids, labels = tokenize_conversation(TURNS, tokenizer, "v1")

    assert labelled_text(input_ids, labels, tokenizer).split() == ["A", "red", "star.</s>", "red</s>"]
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(input_ids, labels, strict=True))


def test_marks_around_an_image_are_those_that_the_model_is_asked_with(tokenizer):
    entries = [{"image": "a.png", "conversations": TURNS}]
    config = SimpleNamespace(mm_use_im_start_end=True)
    mark = ConversationDataset(entries, ".", tokenizer, None, config).mark
    asked = [mark + "\nWhat is this?", "A red star.", "And its color?", "red"]
    conversation = conv_templates["vicuna_v1"].copy()
    for place, text in enumerate(asked):
        conversation.append_message(conversation.roles[place % 2], text)

    input_ids, labels = tokenize_conversation(TURNS, tokenizer, "v1", mark)

    assert mark == "<im_start><image><im_end>"
    assert input_ids == tokenizer_image_token(conversation.get_prompt(), tokenizer)
    assert labelled_text(input_ids, labels, tokenizer).split() == ["A", "red", "star.</s>", "red</s>"]
    assert find_faults(entries, "v1", None, tokenizer, len(input_ids) - 8, mark) == {}


def test_plain_is_the_image_and_its_caption(tokenizer):
    turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": "A red star."}]

    input_ids, labels = tokenize_conversation(turns, tokenizer, "plain")

    assert input_ids[:2] == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX]
    assert labels[:2] == [IGNORE_INDEX, IGNORE_INDEX]
    assert labels[2:] == input_ids[2:]
    assert tokenizer.decode(input_ids[2:]).strip() == "A red star."


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"conversations": TURNS}, "1 <image> marks, but 0 images"),
        ({"image": ["a.png", "b.png"], "conversations": TURNS}, "1 <image> marks, but 2 images"),
        ({"image": 5, "conversations": TURNS}, "'image' must be a file name or a list of them, got 5"),
        ({"image": ["a.png", None], "conversations": TURNS}, "'image' must be a file name or a list of them"),
        ({"image": "a.png", "conversations": TURNS[:3]}, "last turn must be an answer"),
        ({"image": "a.png", "conversations": TURNS[1:3]}, "turn 0 must be"),
        ({"image": "a.png", "conversations": []}, "at least two turns"),
        ({"image": "a.png", "conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "answer in turn 1 is empty"),
        ("text", "at least two turns"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, entry, complaint):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"image": "a.png", "conversations": TURNS}, entry]))

    with pytest.raises(ValueError, match=r"1 of 2 entries of .* cannot be used:\n  entry 1: ") as error:
        read_entries(file)
    assert complaint in str(error.value)


def test_images_that_are_not_there_and_captions_of_no_image_are_faults(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("not an image")
    caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A star."}]
    names = ["good.png", "missing.png", "text.png", "."]
    entries = [{"image": name, "conversations": caption} for name in names]
    entries.append({"image": "good.png", "conversations": TURNS})

    faults = find_faults(entries, "plain", tmp_path)

    assert list(faults) == [1, 2, 3, 4]
    said = ["missing.png does not exist", "text.png is not an image", "is a folder", "one image and its caption"]
    assert all(part in faults[number] for number, part in enumerate(said, start=1))


def test_a_long_summary_names_the_first_entries(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"id": f"x{number}"} for number in range(25)]))
    with pytest.raises(ValueError, match="25 of 25 entries") as error:
        read_entries(tmp_path / "data.json")
    lines = str(error.value).splitlines()
    assert len(lines) == 22 and lines[1].startswith("  entry 0 (id x0): ") and lines[-1] == "  and 5 more"


def test_an_answer_beyond_the_kept_tokens_is_a_fault(tokenizer):
    """At every length: a fault is what leaves no label, whether or not it had to be tokenised to see that."""
    questions = ["<image>", "Ĉu " * 30 + "<image>", "word " * 300]
    entries = [
        {
            "image": ["a.png"] * question.count("<image>"),
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}],
        }
        for question in questions
    ]
    labels = [tokenize_conversation(entry["conversations"], tokenizer, "v1")[1] for entry in entries]
    for length in range(1, max(map(len, labels)) + 2, 5):
        faults = find_faults(entries, "v1", None, tokenizer, length)
        without = [number for number, row in enumerate(labels) if set(row[:length]) == {IGNORE_INDEX}]
        assert list(faults) == without, length
    assert "its first answer begins at token" in find_faults(entries, "v1", None, tokenizer, 40)[2]


@pytest.fixture
def dialogues(tmp_path):
    """Three conversations about one image in each of several turns, or about none; each image has a grey of its own."""
    entries, greys = [], []
    for number, images in enumerate((3, 0, 2)):
        names = [f"{number}_{place}.png" for place in range(images)]
        own = [20 + 60 * number + 20 * place for place in range(images)]
        for name, grey in zip(names, own, strict=True):
            Image.new("RGB", (20, 30), (grey,) * 3).save(tmp_path / name)
        turns = []
        for _ in range(max(1, images)):
            turns.append({"from": "human", "value": "<image> What is it?" if images else "What is it?"})
            turns.append({"from": "gpt", "value": "It is grey."})
        entries.append({"image": names, "conversations": turns})
        greys.append(own)
    return entries, greys


def test_wherever_an_entry_is_cut_each_row_has_its_own_images(dialogues, golden_llava, tokenizer, tmp_path):
    entries, greys = dialogues
    processor = CLIPImageProcessorPil.from_pretrained(next((golden_llava / "openai").glob("*-56")))
    config = SimpleNamespace(image_aspect_ratio="square")
    longest = max(len(tokenize_conversation(entry["conversations"], tokenizer, "v1")[0]) for entry in entries)
    counts = set()
    for length in range(1, longest + 2, 2):
        dataset = ConversationDataset(entries, tmp_path, tokenizer, processor, config, "v1", length)
        batch = Collator(0, 56)([dataset[number] for number in range(3)])
        marks = [int((row == IMAGE_TOKEN_INDEX).sum()) for row in batch["input_ids"]]
        for own, expected in zip(assign_images(marks, len(batch["images"])), greys, strict=True):
            mean, std = processor.image_mean[0], processor.image_std[0]
            seen = [round(float(batch["images"][image][0].mean() * std + mean) * 255) for image in own]
            assert seen == expected[: len(own)], length
        counts.add(tuple(marks))
    assert counts == {(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 0, 2)}


def test_a_row_with_an_image_too_many_is_refused():
    row = {"input_ids": torch.tensor([1, 5]), "labels": torch.tensor([1, 5]), "images": [torch.ones(3, 4, 4)]}
    with pytest.raises(ValueError, match="example 0 of the batch has 0 image marks, but 1 images"):
        Collator(0, 4)([row | {"sizes": [(4, 4)]}])


def test_rows_are_padded_and_every_row_brings_an_image():
    picture = torch.ones(3, 4, 4)
    rows = [
        {"input_ids": torch.tensor([1, 5, 6]), "labels": torch.tensor([-100, 5, 6]), "images": [], "sizes": []},
        {
            "input_ids": torch.tensor([1, -200]),
            "labels": torch.tensor([-100, -100]),
            "images": [picture],
            "sizes": [(9, 7)],
        },
    ]

    batch = Collator(pad_token_id=0, image_size=4)(rows)

    assert batch["input_ids"].tolist() == [[1, 5, 6], [1, -200, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 6], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[True] * 3, [True, True, False]]
    assert batch["images"].sum(dim=(1, 2, 3)).tolist() == [0, 48]
    assert batch["image_sizes"] == [(4, 4), (9, 7)]


def test_learning_rate_rises_and_falls_to_zero():
    factors = [train.learning_rate_factor(step, 100, 0.1) for step in range(101)]

    assert factors[9] == 1 and factors[100] == 0
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)


@pytest.fixture
def data(tmp_path):
    entries = []
    for number in range(6):
        Image.new("RGB", (30, 20), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nHow red is it?"},
            {"from": "gpt", "value": f"about {number}"},
        ]
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    file = tmp_path / "data.json"
    file.write_text(json.dumps(entries))
    return file


@pytest.fixture
def run(golden_llava, data, tmp_path, monkeypatch):
    """Call the trainer with golden checkpoints, whose towers are named relative to the golden folder."""
    monkeypatch.chdir(golden_llava)
    common = ["--data", str(data), "--images", str(tmp_path), "--batch-size", "2", "--workers", "0"]
    return lambda *arguments: train.train(train._parser().parse_args([*map(str, arguments), *common]))


@pytest.fixture
def plain_llama(golden_llava, tmp_path):
    """A random language model without vision, with a LLaVA's tokenizer."""
    folder = tmp_path / "vicuna-base"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).save_pretrained(folder)
    for file in (golden_llava / "checkpoints" / "llava-v1.5-tiny").glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_pretrain_writes_a_projector_that_loads_on_its_base(run, golden_llava, plain_llama, tmp_path):
    base, tower = plain_llama, next((golden_llava / "openai").glob("*-56"))

    run("--stage", "pretrain", "--model", base, "--vision-tower", tower, "--output", tmp_path / "llava-out")

    assert {path.name for path in (tmp_path / "llava-out").iterdir()} == {
        "mm_projector.bin",
        "config.json",
        "log.jsonl",
    }
    _, model, _, _ = load_pretrained_model(str(tmp_path / "llava-out"), str(base), "llava-out", device="cpu")
    trained = torch.load(tmp_path / "llava-out" / "mm_projector.bin", weights_only=True)
    loaded = model.get_model().mm_projector.state_dict()
    assert torch.equal(loaded["0.weight"], trained["model.mm_projector.0.weight"].half())


def test_finetune_changes_the_decoder_and_not_the_tower(run, golden_llava, tmp_path):
    source = golden_llava / "checkpoints" / "llava-v1.5-tiny"

    run("--stage", "finetune", "--model", source, "--output", tmp_path / "llava-out", "--learning-rate", "1e-2")

    before, after = (
        load_pretrained_model(str(path), None, "llava", device="cpu", torch_dtype=torch.float32)[1].state_dict()
        for path in (source, tmp_path / "llava-out")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in moved and "model.mm_projector.0.weight" in moved
    assert not any(".vision_tower." in name for name in moved)


def test_finetune_keeps_a_tower_that_was_trained_with_the_checkpoint(run, golden_llava, tmp_path):
    source, out = tmp_path / "llava-source", tmp_path / "llava-out"
    tokenizer, model, _, _ = load_pretrained_model(
        str(golden_llava / "checkpoints" / "llava-v1.5-tiny"), None, "llava", device="cpu", torch_dtype=torch.float32
    )
    tower = model.get_vision_tower().state_dict()
    torch.nn.init.ones_(tower["vision_tower.vision_model.pre_layrnorm.weight"])
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)

    run("--stage", "finetune", "--model", source, "--output", out)

    assert weight_names(out) == weight_names(source)
    _, trained, _, _ = load_pretrained_model(str(out), None, "llava", device="cpu", torch_dtype=torch.float32)
    after = trained.get_vision_tower().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in tower.items())


def test_adapters_load_on_their_base(run, golden_llava, tmp_path):
    pytest.importorskip("peft")
    source = golden_llava / "checkpoints" / "llava-v1.5-tiny"
    out = tmp_path / "llava-lora"

    run("--stage", "finetune", "--model", source, "--output", out, "--lora-rank", "2", "--learning-rate", "1e-2")

    _, model, _, _ = load_pretrained_model(str(out), str(source), "llava-lora", device="cpu", torch_dtype=torch.float32)
    before = load_pretrained_model(str(source), None, "llava", device="cpu", torch_dtype=torch.float32)[1].state_dict()
    after = model.state_dict()
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_an_unfinished_run_is_not_overwritten(run, golden_llava, tmp_path):
    source = golden_llava / "checkpoints" / "llava-v1.5-tiny"
    run("--stage", "finetune", "--model", source, "--output", tmp_path / "a", "--stop-after", "1")

    with pytest.raises(ValueError, match="give --resume"):
        run("--stage", "finetune", "--model", source, "--output", tmp_path / "a")


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, golden_llava, tmp_path):
    source = golden_llava / "checkpoints" / "llava-v1.5-tiny"
    arguments = ["--stage", "finetune", "--model", source, "--learning-rate", "1e-3", "--epochs", "2"]

    assert run(*arguments, "--output", tmp_path / "a") == 0
    assert run(*arguments, "--output", tmp_path / "b", "--stop-after", "4") == 3
    for option, value in (("max_length", "64"), ("warmup", "0.5"), ("clip", "2"), ("weight_decay", "0.1")):
        with pytest.raises(ValueError, match=f"was trained with {option} "):
            run(*arguments, "--output", tmp_path / "b", "--resume", f"--{option}", value)
    assert run(*arguments, "--output", tmp_path / "b", "--resume") == 0

    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("method", "layer", "options"), [("otprune", 0, []), ("fastv", 1, ["--gradient-checkpointing"])]
)
def test_the_projector_is_trained_on_what_pruning_leaves(
    run, golden_llava, plain_llama, tmp_path, monkeypatch, capsys, method, layer, options
):
    tower = next((golden_llava / "openai").glob("*-56"))
    common = ("--stage", "pretrain", "--model", plain_llama, "--vision-tower", tower, *options)

    run(*common, "--output", tmp_path / "unpruned")
    for name, value in {"BASELINE": method, "SUBSET_RATIO": 0.5, "LAYER_INDEX": layer}.items():
        monkeypatch.setenv(name, str(value))
    run(*common, "--output", tmp_path / "pruned")

    assert f"llava: {method} keeps 50 %" in capsys.readouterr().err
    unpruned, pruned = (
        torch.load(tmp_path / name / "mm_projector.bin", weights_only=True) for name in ("unpruned", "pruned")
    )
    assert all(not torch.equal(weight, unpruned[name]) for name, weight in pruned.items())


class TestFaultyEntries:
    """Among six entries one is wrong, or its image is."""

    @pytest.fixture
    def finetune(self, run, golden_llava, tmp_path):
        source = golden_llava / "checkpoints" / "llava-v1.5-tiny"
        return lambda *options: run(
            "--stage", "finetune", "--model", source, "--output", tmp_path / "llava-out", *options
        )

    def spoil(self, data, **changes):
        entries = json.loads(data.read_text())
        entries[3] |= changes
        data.write_text(json.dumps(entries))

    @pytest.mark.parametrize("image", [5, "gone.png"])
    def test_they_end_a_run_before_the_model_is_read(self, finetune, data, image, monkeypatch):
        self.spoil(data, image=image)
        monkeypatch.setattr(train, "load_trainable", lambda _: pytest.fail("the model is read"))
        with pytest.raises(ValueError, match=r"1 of 6 entries .*\n  entry 3 \(id 3\): "):
            finetune()

    def test_a_damaged_image_is_named_when_it_is_read(self, finetune, data, tmp_path):
        cut(tmp_path / "3.png")
        with pytest.raises(ValueError, match=r"entry 3 \(id 3\): .*3.png is truncated"):
            finetune()

    def test_a_loss_that_is_no_number_names_its_entries(self, finetune, tmp_path):
        order = train._order(6, 1, 0)[2:4]
        names = ", ".join(f"entry {number} \\(id {number}\\)" for number in order)
        with pytest.raises(FloatingPointError, match=f"the loss of step 1 is nan, on {names}"):
            finetune("--learning-rate", "1e30")

    @pytest.mark.parametrize("workers", [0, 1])
    def test_on_the_command_line_they_are_one_sentence(
        self, golden_llava, data, tmp_path, monkeypatch, capsys, workers
    ):
        cut(tmp_path / "3.png")
        model = golden_llava / "checkpoints" / "llava-v1.5-tiny"
        monkeypatch.chdir(golden_llava)
        options = ["--stage", "finetune", "--model", model, "--data", data, "--images", tmp_path, "--output", tmp_path]
        monkeypatch.setattr(sys, "argv", ["train", *map(str, options), "--workers", str(workers)])
        assert train.main() == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("python -m llava.train.train: entry 3 (id 3): ")


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:60])
