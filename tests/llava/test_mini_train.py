"""The recipe of llava-mini: exact attention, exact packing, resumable training, a checkpoint that loads."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mini import scenes
from llava.mini.pages import SEASONS
from llava.mini.questions import sample_questions
from llava.mini.seeded_random import WORLD_VERSION, SeededRandom
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.tokenizer import load_tokenizer
from mini_training import reading, tower
from mini_training.decoder import ConversationTask
from mini_training.letter_exercises import sample_letter_exercises
from mini_training.packing import Mixture, PackedScenes, collate, packed_mask
from mini_training.stage import Stage, learning_rate_factor
from mini_training.train import CONFIG, STAGES, conversation_task, grow, main, read_config
from mini_training.vocabulary import build_tokenizer, conversation_texts
from weight_names import weight_names

SMOKE = ("--smoke", "--fp32", "--threads", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a whole run of the recipe at its smallest."""
    folder = tmp_path_factory.mktemp("mini") / "run"
    assert main([*SMOKE, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer(run):
    return load_tokenizer(run / "checkpoint")


@pytest.fixture(scope="module")
def loaded(run):
    return load_pretrained_model(
        str(run / "checkpoint"), None, "llava-mini", device="cpu", torch_dtype=torch.float32, attn_implementation="sdpa"
    )


def test_packed_tokens_see_the_prefix_and_their_own_question():
    mask, positions = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]), torch.float32)

    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert positions[0, :5].tolist() == [0, 1, 2, 3, 2]


def test_a_letter_exercise_names_the_option_whose_letter_is_the_answer():
    for qa in sample_letter_exercises(SeededRandom("exercises"), 40):
        assert qa.answer_text in qa.question
        assert len(set(qa.choices)) == len(qa.choices) >= 2


def test_fixed_phrases_and_the_words_of_the_world_are_single_pieces(tmp_path):
    build_tokenizer(tmp_path, **read_config(CONFIG)["tokenizer"])
    tokenizer = load_tokenizer(tmp_path)

    for text in (*scenes.COLORS, *scenes.SHAPES, *scenes.WORDS, "yes", "no"):
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1, text
    _, whole = conversation_texts(
        sample_questions(scenes.sample_scene(5, "train"), SeededRandom("x"), 1, ("exists",), 0)[0]
    )
    assert len(tokenizer_image_token(whole, tokenizer)) < 24


def test_a_packed_question_is_answered_as_if_it_were_asked_alone(loaded, tokenizer):
    _, model, image_processor, _ = loaded
    example = PackedScenes("validation", 3, 1, 1, Mixture(questions=5), tokenizer)[0]
    (batch,) = collate([example])
    with torch.inference_mode():
        logits, labels, segments, _ = ConversationTask(model).answer_logits(batch)

    images = process_images([Image.fromarray(example.images[0])], image_processor, model.config)
    for number, (question, wanted) in enumerate(zip(example.questions, example.labels, strict=True), start=1):
        ids = torch.tensor([example.prefix + question])
        with torch.inference_mode():
            alone = model(ids, images=images).logits[0]
        places = [i for i, label in enumerate(wanted) if label != IGNORE_INDEX]
        start = len(example.prefix) + 575
        expected = alone[[start + place - 1 for place in places]]
        assert labels[segments == number].tolist() == [wanted[place] for place in places]
        torch.testing.assert_close(logits[segments == number], expected, rtol=1e-4, atol=1e-4)


def test_prompts_end_where_the_answer_begins(tokenizer):
    example = PackedScenes("train", 0, 1, 1, Mixture(questions=6, choice_percent=50), tokenizer)[0]

    assert example.prefix[-1] == IMAGE_TOKEN_INDEX and example.prefix.count(IMAGE_TOKEN_INDEX) == 1
    for question, labels in zip(example.questions, example.labels, strict=True):
        first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        assert tokenizer.decode(question[:first]).endswith("ASSISTANT:")
        assert labels[first:] == question[first:] and labels[-1] == tokenizer.eos_token_id


def test_examples_come_by_number_and_batches_are_of_one_sort(tokenizer):
    data = PackedScenes("train", 0, 12, 2, Mixture(questions=4, pair_every=3, text_every=3), tokenizer)

    first, again = data[3], data[3]
    assert first.questions == again.questions and np.array_equal(first.images, again.images)
    assert [len(data[number].images) for number in range(6)] == [1, 1, 2, 2, 0, 0]


def test_pixels_are_those_of_the_image_processor(loaded):
    image = scenes.render(scenes.sample_scene(1, "validation"))
    processed = loaded[2](image, return_tensors="pt")["pixel_values"][0]

    levels = torch.from_numpy(np.array(image))[None]
    torch.testing.assert_close(tower.pixel_values(levels)[0], processed, rtol=0, atol=1e-5)


def test_every_object_has_one_middle_patch_and_knows_its_box():
    scene = scenes.sample_scene(7, "train")
    targets = tower.scene_targets(scene)

    assert targets["middle"].sum() == len(scene.objects)
    boxes = targets["box"][targets["middle"] == 1] * scenes.IMAGE_SIZE
    assert {(round(float(x)), round(float(y))) for x, y in boxes[:, 2:4]} == {
        (o.width, o.height) for o in scene.objects
    }
    assert targets["kinds"].sum() == len({(o.shape, o.color) for o in scene.objects})


def test_nothing_overlaps_in_a_crowded_scene():
    scene = tower.crowded_scene("train", range(6))

    assert len(scene.objects) > len(scenes.sample_scene(0, "train").objects)
    taken = np.zeros((336, 336), int)
    for thing in scene.objects:
        taken[thing.top : thing.top + thing.height, thing.left : thing.left + thing.width] += 1
    assert taken.max() == 1


def test_learning_rate_is_a_trapezoid():
    stage = Stage("x", steps=100, batch=1, learning_rate=1, matrix_learning_rate=1, warmup=0.1, decay=0.2)
    factors = [learning_rate_factor(step, stage) for step in range(101)]

    assert factors[9:81] == [1.0] * 72 and factors[100] == 0
    assert math.isclose(factors[90], 0.5)


def test_the_run_leaves_a_checkpoint_of_the_published_layout(run, golden_llava):
    names = {path.name for path in (run / "checkpoint").iterdir()}

    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "training.json",
        "vision_tower",
    }
    config = json.loads((run / "checkpoint" / "config.json").read_text())
    assert config["model_type"] == "llava_llama" and config["mm_vision_tower"] == "vision_tower"
    assert weight_names(run / "checkpoint") == weight_names(golden_llava / "checkpoints" / "llava-v1.5-tiny")
    published_tower = golden_llava / "openai" / "clip-vit-tiny-patch14-56"
    assert weight_names(run / "checkpoint" / "vision_tower") == weight_names(published_tower)
    record = json.loads((run / "checkpoint" / "training.json").read_text())
    assert record["world"] == WORLD_VERSION and set(record["stages"]) == set(STAGES)


def test_a_killed_run_resumes_to_the_same_weights(run, tmp_path, monkeypatch):
    """The run is stopped after every step; each time the process ends as if it had been killed."""
    output = tmp_path / "again"
    arguments = [*SMOKE, "--output", str(output), "--minutes", "0"]
    codes = [main(arguments)]
    while codes[-1] == 3:
        codes.append(main([*arguments, "--resume"]))

    assert codes.count(3) > 5
    for name in STAGES:
        whole, pieces = (torch.load(folder / f"{name}.pt", weights_only=True) for folder in (run, output))
        assert whole["step"] == pieces["step"]
        assert all(torch.equal(whole["model"][key], pieces["model"][key]) for key in whole["model"])


@pytest.fixture(scope="module")
def reader(run, tmp_path_factory) -> Path:
    """The folder of a run that goes on from `run` and learns to read."""
    folder = tmp_path_factory.mktemp("mini") / "reader"
    assert main([*SMOKE, "--base", str(run / "checkpoint"), "--output", str(folder)]) == 0
    return folder


def test_a_reader_is_its_base_trained_on(run, reader, tmp_path):
    """Same layout and tokenizer, other weights; the same ones where the run is stopped after every step."""
    for name in ("tokenizer.model", "config.json"):
        assert (reader / "checkpoint" / name).read_bytes() == (run / "checkpoint" / name).read_bytes()
    record = json.loads((reader / "checkpoint" / "training.json").read_text())
    assert list(record["stages"]) == list(record["recipe"]["stages"]) == ["read_tower", "read"]
    assert record["base"] == str(run / "checkpoint")
    arguments = [*SMOKE, "--base", str(run / "checkpoint"), "--output", str(tmp_path), "--minutes", "0"]
    while main(arguments) == 3:
        arguments = [*arguments[:10], "--resume"]
    for file in ("model.safetensors", "vision_tower/model.safetensors"):
        base, whole, pieces = (load_file(folder / "checkpoint" / file) for folder in (run, reader, tmp_path))
        assert base.keys() == whole.keys()
        assert any(not torch.equal(base[name], whole[name]) for name in base)
        assert all(torch.equal(pieces[name], whole[name]) for name in base)


def test_stages_of_one_kind_of_run_are_no_stages_of_the_other(tmp_path, capsys):
    for arguments in (["--stage", "read"], ["--stage", "ground", "--base", "llava-mini"]):
        assert main([*arguments, "--output", str(tmp_path)]) == 2
        assert "--base" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["crowded", "word", "poster", "grid", "chart", "receipt"])
def test_every_text_on_a_page_can_be_read_from_the_targets_of_its_patches(kind):
    alphabet = ("", *scenes.CHARACTERS, ".")
    for seed in range(20):
        page = reading.draw_page(kind, SeededRandom("targets", kind, seed))
        targets = reading.page_targets(page)
        spelt = {
            "".join(alphabet[targets[f"text_{i}"][patch]] for i in range(reading.TEXT_LENGTH))
            for patch in np.flatnonzero(targets["kind"])
        }
        assert spelt == {mark.text.replace(" ", "")[:6] for mark in page.marks if getattr(mark, "text", "")} or (
            kind == "receipt"  # "cat shop" is longer than what a patch says
        )
        assert (targets["text_0"] >= 0).sum() == (targets["kind"] > 0).sum()


def test_a_number_in_a_table_knows_its_row_and_column_and_the_largest_of_a_column():
    page = reading.draw_page("grid", SeededRandom("targets"))
    targets, header = reading.page_targets(page), page.content.header
    for column, name in enumerate(header):
        own = (targets["column"] == 1 + SEASONS.index(name)) & (targets["rank"] == 2)
        [row] = set(targets["row"][own])
        values = page.content.rows
        assert values[scenes.WORDS[row - 1]][column] == max(cells[column] for cells in values.values())


def test_questions_about_pages_end_in_their_answers(tokenizer):
    phases = [{"until": 0.5, "pages": {"word": 1}}, {"until": 1, "pages": {"grid": 1}}]
    data = reading.PackedPages("train", 0, 4, reading.Reading(phases, questions=8), tokenizer)
    assert [set(data[number].forms) <= {"text", "text_in_color"} for number in range(4)] == [True, True, False, False]
    for example in (data[0], data[3]):
        assert example.prefix[-1] == IMAGE_TOKEN_INDEX and len(example.images) == 1
        for question, labels in zip(example.questions, example.labels, strict=True):
            assert labels[-1] == tokenizer.eos_token_id and question[-2] == labels[-2]


def test_a_deeper_model_begins_as_the_shallow_one(run, tokenizer):
    config = read_config(CONFIG, smoke=True)
    shallow = conversation_task("finetune", config, len(tokenizer), run)
    state = torch.load(run / "finetune.pt", weights_only=True)["model"]
    grow(shallow, state)
    deep = conversation_task("deepen", config, len(tokenizer), run)
    grow(deep, state)
    assert len(deep.model.get_model().layers) == 2 * len(shallow.model.get_model().layers)
    (batch,) = collate([PackedScenes("validation", 0, 4, 2, Mixture(questions=3), tokenizer)[i] for i in range(2)])
    with torch.no_grad():
        torch.testing.assert_close(deep.answer_logits(batch)[0], shallow.answer_logits(batch)[0])
    with pytest.raises(ValueError, match="a model of 2 layers cannot continue one of 4"):
        grow(shallow, torch.load(run / "deepen.pt", weights_only=True)["model"])


def test_helpers_that_draw_images_change_nothing(run, tmp_path):
    config = tmp_path / "run"
    shutil.copytree(run, config)
    (config / "deepen.pt").unlink()
    assert main([*SMOKE, "--output", str(config), "--resume", "--stage", "deepen", "--workers", "2"]) == 0
    ours, theirs = (torch.load(folder / "deepen.pt", weights_only=True)["model"] for folder in (config, run))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_run_is_not_overwritten(run, capsys):
    assert main([*SMOKE, "--output", str(run)]) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("plain_percent: 20", "plain_percent: 120", "stage ground: plain_percent must be a whole number from 0 to 100"),
        ("plain_percent: 20", "plain_precent: 20", "stage ground: there is no setting 'plain_precent'"),
        ("steps: 4169", "steps: many", "stage ground: steps must be a whole number >= 1, not 'many'"),
        ("{weight: 0.08,", "{weigth: 0.08,", "stage ground: there is no setting 'weigth'"),
        ("farthest: 6", "farest: 6", "stage ground: form must be one of"),
        ("decay: 0.7\n", "decay: 7\n", "stage deepen: decay must be a number from 0 to 1, not 7"),
        ("poster: 2, grid: 5", "poster: 2, table: 5", "stage read_tower: page must be one of word, digits"),
        ("until: 0.12", "until: 1.12", "stage read: until of the phases must rise to 1, got [1.12, 1]"),
        ("  deepen:", "  deeper:", "stage deepen: 'deepen' is missing"),
        ("stages:", "stage:", "it needs seed, tokenizer, tower, decoder and stages"),
        ("seed: 0", "seed: [", "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_before_the_first_stage(tmp_path, capsys, before, after, said):
    text = CONFIG.read_text()
    assert before in text
    (tmp_path / "recipe.yaml").write_text(text.replace(before, after))
    assert main(["--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_of_earlier_versions_hands_over(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("llava.mini.train", run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: python -m mini_training")
