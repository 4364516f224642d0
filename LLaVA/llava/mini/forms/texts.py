"""Forms that need no picture."""

from __future__ import annotations

from collections.abc import Callable

from llava.mini.captions import an
from llava.mini.forms.facts import Fact, near_numbers, other_than
from llava.mini.forms.knowing import CATEGORIES, CATEGORY_OF, CORNER_COUNTS, CORNERS, FRUITS, SOUNDS
from llava.mini.scenes import COLORS, WORDS, Dice

__all__ = ["TEXT_FORMS"]


def _text_sum(dice: Dice) -> Fact:
    a, b = dice.below(10), dice.between(1, 3)
    return Fact("text_sum", f"What is {a} plus {b}?", str(a + b), near_numbers(dice, a + b, 0, 12))


def _text_category(dice: Dice) -> Fact:
    category = dice.choice(tuple(CATEGORIES))
    word = dice.choice(CATEGORIES[category])
    if dice.chance(50):
        return Fact("text_category", f"What kind of thing is {word}?", category, other_than(CATEGORIES, category))
    noun = {"food": "food", "nature": "something in nature"}.get(category, an(category))
    wrong = tuple(w for w in WORDS if CATEGORY_OF[w] != category)
    return Fact("text_category", f"Which of these is {noun}?", word, wrong)


def _text_corners(dice: Dice) -> Fact:
    shape = dice.choice(tuple(CORNERS))
    answer = str(CORNERS[shape])
    return Fact("text_corners", f"How many corners does a {shape} have?", answer, other_than(CORNER_COUNTS, answer))


def _text_fruit(dice: Dice) -> Fact:
    color = dice.choice(tuple(COLORS))
    return Fact("text_fruit", f"Which fruit is {color}?", FRUITS[color], other_than(FRUITS.values(), FRUITS[color]))


def _text_sound(dice: Dice) -> Fact:
    animal = dice.choice(tuple(SOUNDS))
    return Fact(
        "text_sound", f"What sound does a {animal} make?", SOUNDS[animal], other_than(SOUNDS.values(), SOUNDS[animal])
    )


TEXT_FORMS: dict[str, Callable[[Dice], Fact]] = {
    "text_sum": _text_sum,
    "text_category": _text_category,
    "text_corners": _text_corners,
    "text_fruit": _text_fruit,
    "text_sound": _text_sound,
}
"""Form name -> function of dice: questions that need no image."""
