"""Forms that need no image."""

from __future__ import annotations

from llava.mini.captions import an
from llava.mini.forms.facts import Fact, named, near_numbers, other_than
from llava.mini.forms.knowledge import CATEGORY_OF, CORNER_COUNTS, CORNERS, FRUITS, SOUNDS
from llava.mini.scenes import CATEGORIES, COLORS, WORDS
from llava.mini.seeded_random import SeededRandom


def _text_sum(rng: SeededRandom) -> Fact:
    a, b = rng.below(10), rng.between(1, 3)
    return Fact("text_sum", f"What is {a} plus {b}?", str(a + b), near_numbers(rng, a + b, 0, 12))


def _text_category(rng: SeededRandom) -> Fact:
    category = rng.choice(tuple(CATEGORIES))
    word = rng.choice(CATEGORIES[category])
    if rng.chance(50):
        return Fact("text_category", f"What kind of thing is {word}?", category, other_than(CATEGORIES, category))
    noun = {"food": "food", "nature": "something in nature"}.get(category, an(category))
    wrong = tuple(w for w in WORDS if CATEGORY_OF[w] != category)
    return Fact("text_category", f"Which of these is {noun}?", word, wrong)


def _text_corners(rng: SeededRandom) -> Fact:
    shape = rng.choice(tuple(CORNERS))
    answer = str(CORNERS[shape])
    return Fact("text_corners", f"How many corners does a {shape} have?", answer, other_than(CORNER_COUNTS, answer))


def _text_fruit(rng: SeededRandom) -> Fact:
    color = rng.choice(tuple(COLORS))
    return Fact("text_fruit", f"Which fruit is {color}?", FRUITS[color], other_than(FRUITS.values(), FRUITS[color]))


def _text_sound(rng: SeededRandom) -> Fact:
    animal = rng.choice(tuple(SOUNDS))
    return Fact(
        "text_sound", f"What sound does a {animal} make?", SOUNDS[animal], other_than(SOUNDS.values(), SOUNDS[animal])
    )


TEXT_FORMS = named(_text_sum, _text_category, _text_corners, _text_fruit, _text_sound)
"""Form name -> function of a `SeededRandom`: questions that need no image."""
