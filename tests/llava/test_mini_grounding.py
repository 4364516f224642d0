"""What the words of a question point at, and heads that learn to say so."""

from __future__ import annotations

import pytest
import torch

from llava.mini import scenes
from llava.mini.questions import sample_questions
from llava.mini.seeded_random import SeededRandom
from llava.model.builder import resolve_model_path
from llava.model.tokenizer import load_tokenizer
from mini_training.grounding import COLUMNS, GroundingHeads, grounding_targets
from mini_training.packing import pack

RGB = (0, 0, 0)


def thing(shape: str, color: str, size: str, x: int, y: int, text: str = "") -> scenes.SceneObject:
    width = {"small": 20, "medium": 50, "large": 100}[size]
    left, top = x - width // 2, y - width // 2
    return scenes.SceneObject(shape, color, size, left, top, width, width, RGB, text, 2 if text else 0)


def scene(*things: scenes.SceneObject) -> scenes.Scene:
    return scenes.Scene("train", 0, "tan", "plain", 8, (0, 0), things, ())


FIRST = scene(
    thing("circle", "red", "small", 60, 60),
    thing("ring", "red", "large", 250, 250),
    thing("star", "blue", "medium", 170, 60),
    thing("sign", "white", "small", 60, 280, "cat"),
    thing("sign", "green", "small", 280, 60, "7"),
)
SECOND = scene(thing("circle", "blue", "small", 170, 170))


def spelt(text: str) -> list[str]:
    """The tokens of a text of single words, as the tokenizer's vocabulary spells them."""
    return [word if word in ("<0x0A>", "?", ".", '"', "A", "B") else "▁" + word for word in text.split()]


def pointed_at(text: str, *shown: scenes.Scene, right: str = "") -> dict[str, dict[str, int]]:
    """The last word of a phrase or option -> what its token points at."""
    words = text.split()
    found = grounding_targets(spelt(text), shown, right)
    return {words[token]: {n: v for n, v in zip(COLUMNS, row, strict=True) if v >= 0} for token, *row in found}


@pytest.mark.parametrize(
    ("text", "word", "count"),
    [
        ("Is there a red circle ?", "circle", 1),
        ("Is there a blue circle ?", "circle", 0),
        ("How many red shapes are there ?", "shapes", 2),
        ("How many small shapes are there ?", "shapes", 1),
        ("How many shapes are there ?", "shapes", 3),
        ("How many objects are there ?", "objects", 5),
        ("How many signs are there ?", "signs", 2),
        ("What color is the sign ?", "sign", 2),
        ("Is there a sign that says cat ?", "cat", 1),
        ("Is there a sign that says dog ?", "dog", 0),
        ('Is the word " dog " shown ?', "dog", 0),
        ("How big is the shape at the top ?", "top", 1),
        ("How big is the shape in the bottom right ?", "right", 1),
    ],
)
def test_a_phrase_points_at_what_fits_it(text, word, count):
    assert pointed_at(text, FIRST)[word]["count"] == count


def test_a_phrase_for_one_thing_knows_it_whole():
    known = pointed_at("Where is the large ring ?", FIRST)["ring"]

    assert (known["x"], known["y"], known["width"]) == (250, 250, 100)
    assert scenes.PLACES[known["place"]] == "bottom right" and tuple(scenes.COLORS)[known["color"]] == "red"
    assert pointed_at("What does the green sign say ?", FIRST)["sign"]["text"] == scenes.TEXTS.index("7")
    assert pointed_at("What is the number in the image ?", FIRST)["number"]["text"] == scenes.TEXTS.index("7")


def test_a_side_that_is_asked_for_is_no_part_of_the_phrase():
    assert pointed_at("Is the red circle at the top or at the bottom ?", FIRST).keys() == {"circle"}


def test_two_things_are_compared_and_a_stated_number_is_checked():
    second = pointed_at("Is the red circle above the red ring ?", FIRST)["ring"]
    assert [second[name] for name in ("further_right", "lower", "larger", "same_color")] == [1, 1, 1, 1]
    level = pointed_at("Is the star above the green sign ?", FIRST)["sign"]
    assert level["further_right"] == 1 and "lower" not in level and "larger" not in level and level["same_color"] == 0
    assert pointed_at("Are there two red shapes ?", FIRST)["shapes"]["stated_count"] == 1
    assert pointed_at("Are there exactly three red shapes ?", FIRST)["shapes"]["stated_count"] == 0


def test_of_two_images_each_is_counted_alone():
    both = pointed_at("Which image shows a circle ?", FIRST, SECOND)["circle"]
    assert both == {"count": 1, "second_count": 1}
    assert pointed_at("Which image shows a star ?", FIRST, SECOND)["star"] == {"count": 1, "second_count": 0}


def test_options_are_right_or_wrong_and_a_hint_is_no_option():
    text = "<0x0A> A polygon is a shape . <0x0A> Which ? <0x0A> A . not so <0x0A> B . so <0x0A>"
    targets = grounding_targets(spelt(text), (), "B")

    words = text.split()
    assert [(words[token - 1 : token + 1], row[COLUMNS.index("right")]) for token, *row in targets] == [
        (["not", "so"], 0),
        ([".", "so"], 1),
    ]


def test_targets_agree_with_what_the_generator_says():
    """Counts asked for openly are the counts pointed at, and every choice has exactly one right option."""
    tokenizer = load_tokenizer(resolve_model_path("llava-mini"))
    counted = options = 0
    for seed in range(12):
        shown = scenes.sample_scene(seed, "validation")
        asked = sample_questions(shown, SeededRandom("grounding", seed), 16, choice_percent=50)
        packed = pack(asked, [shown], tokenizer)
        for qa, targets in zip(asked, packed.grounding, strict=True):
            rights = [row[1 + COLUMNS.index("right")] for row in targets]
            if qa.choices:
                options += 1
                assert rights.count(1) == 1 and rights.count(0) == len(qa.choices) - 1, qa.prompt
            elif qa.form == "count":
                counted += 1
                assert targets[0][1 + COLUMNS.index("count")] == int(qa.answer), qa.prompt
            elif qa.form in ("exists", "is_text"):
                (target,) = targets
                assert (target[1 + COLUMNS.index("count")] > 0) == (qa.answer == "yes"), qa.prompt
    assert counted > 3 and options > 30


def test_heads_learn():
    torch.manual_seed(0)
    heads = GroundingHeads(16)
    hidden = torch.randn(6, 16)
    targets = torch.full((6, len(COLUMNS)), -1)
    targets[:, COLUMNS.index("color")] = torch.arange(6)
    targets[:, COLUMNS.index("right")] = torch.tensor([0, 1, 0, 0, 1, 1])
    targets[:, COLUMNS.index("x") :] = torch.arange(18).view(6, 3) * 18
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.03)
    for _ in range(300):
        report = heads(hidden, hidden, -hidden, targets)
        sum(value for name, value in report.items() if "/" not in name).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert all(report[f"accuracy/{name}"] == 1 for name in ("color", "right", "box"))
