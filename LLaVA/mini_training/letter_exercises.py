"""Exercises without an image: reading a list of options and naming a letter, nothing else.

To answer with a letter a model has to find an answer, find it again among the options, and look up the letter in front.
Learnt all at once, that takes a small model very long; the last two steps alone take minutes, and the rest follows.
"""

from __future__ import annotations

from llava.mini.forms import Fact
from llava.mini.questions import CHOICE_STYLES, QA, as_choice
from llava.mini.scenes import BACKGROUNDS, COLORS, NUMBERS, PLACES, SHAPES, WORDS
from llava.mini.seeded_random import SeededRandom

POOLS = (tuple(COLORS), SHAPES, WORDS, NUMBERS, PLACES, tuple(BACKGROUNDS))
WORDINGS = ("Which letter stands for {}?", "Which option is {}?", "Find {}.")


def sample_letter_exercises(rng: SeededRandom, n: int) -> list[QA]:
    """`n` questions that name the right option themselves, in the layouts of the benchmarks."""
    exercises = []
    for _ in range(n):
        pool = rng.choice(POOLS)
        answer = rng.choice(pool)
        wrong = tuple(word for word in pool if word != answer)
        style = rng.choice(CHOICE_STYLES)
        n_choices = 4 if style == "seedbench" else rng.between(2, 4)
        fact = Fact("letter", rng.choice(WORDINGS).format(answer), answer, wrong)
        exercises.append(as_choice(fact, rng, style, n_choices))
    return exercises
