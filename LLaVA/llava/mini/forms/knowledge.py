"""Forms that join what is seen with something known: words' meanings, fruits' colours, numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import wraps

from llava.mini.captions import an
from llava.mini.forms.facts import Fact, named, near_numbers, other_than, yes_no
from llava.mini.forms.naming import about_one
from llava.mini.scenes import CATEGORIES, NUMBERS, WORDS, Scene, SceneObject
from llava.mini.seeded_random import SeededRandom

CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}

SOUNDS = {"cat": "meow", "dog": "bark", "cow": "moo", "bird": "tweet"}

FRENCH = dict(
    re.findall(
        r"(\w+):(\w+)",
        "cat:chat dog:chien fox:renard cow:vache bird:oiseau fish:poisson milk:lait apple:pomme lemon:citron "
        "bread:pain rice:riz car:voiture boat:bateau truck:camion sun:soleil sky:ciel tree:arbre leaf:feuille "
        "stone:pierre cloud:nuage",
    )
)

FRUITS = {
    "red": "cherry",
    "orange": "mandarin",
    "yellow": "banana",
    "green": "pear",
    "blue": "blueberry",
    "purple": "grape",
    "black": "blackberry",
    "white": "coconut",
}

CORNERS = {"circle": 0, "ring": 0, "triangle": 3, "square": 4, "diamond": 4, "star": 10, "cross": 12}
CORNER_COUNTS = ("0", "3", "4", "10", "12")


def on_sign(texts: Iterable[str]) -> Callable[[Callable], Callable[[Scene, SeededRandom], Fact | None]]:
    """Makes a form of a function that states a fact about one sign: about the scene's only one with a word.

    (Or with a number, when `texts` are numbers.) The form states nothing where that sign's text is not in `texts`.
    """
    texts = tuple(texts)
    alphabet = NUMBERS if texts[0] in NUMBERS else WORDS

    def wrap(state: Callable[[SceneObject, SeededRandom], Fact]) -> Callable[[Scene, SeededRandom], Fact | None]:
        @wraps(state)
        def form(scene: Scene, rng: SeededRandom) -> Fact | None:
            signs = [sign for sign in scene.signs if sign.text in alphabet]
            return state(signs[0], rng) if len(signs) == 1 and signs[0].text in texts else None

        return form

    return wrap


@on_sign(WORDS)
def _category(sign: SceneObject, rng: SeededRandom) -> Fact:
    answer = CATEGORY_OF[sign.text]
    wording = rng.choice(("What kind of thing does the sign name?", "What kind of thing is the word about?"))
    return Fact("category", wording, answer, other_than(CATEGORIES, answer))


@on_sign(WORDS)
def _is_category(sign: SceneObject, rng: SeededRandom) -> Fact:
    answer = CATEGORY_OF[sign.text]
    yes = rng.chance(50)
    stated = answer if yes else rng.choice(other_than(CATEGORIES, answer))
    noun = {"food": "food", "nature": "something in nature"}.get(stated, an(stated))
    return yes_no("is_category", f"Does the word in the image name {noun}?", yes)


@on_sign(SOUNDS)
def _sound(sign: SceneObject, rng: SeededRandom) -> Fact:
    answer = SOUNDS[sign.text]
    return Fact("sound", "What sound does the animal on the sign make?", answer, other_than(SOUNDS.values(), answer))


@on_sign(FRENCH)
def _is_french(sign: SceneObject, rng: SeededRandom) -> Fact:
    yes = rng.chance(50)
    stated = FRENCH[sign.text] if yes else rng.choice(other_than(FRENCH.values(), FRENCH[sign.text]))
    return yes_no("is_french", f'Is "{stated}" the French translation of the word in the image?', yes)


@about_one(lambda scene: scene.shapes, hide=("color",))
def _fruit(thing: SceneObject, phrase: str, scene: Scene, rng: SeededRandom) -> Fact:
    answer = FRUITS[thing.color]
    return Fact("fruit", f"Which fruit has the color of the {phrase}?", answer, other_than(FRUITS.values(), answer))


@about_one(lambda scene: [o for o in scene.shapes if o.shape in CORNERS], hide=("shape",))
def _corners(thing: SceneObject, phrase: str, scene: Scene, rng: SeededRandom) -> Fact:
    answer = str(CORNERS[thing.shape])
    return Fact("corners", f"How many corners does the {phrase} have?", answer, other_than(CORNER_COUNTS, answer))


@on_sign(NUMBERS)
def _number_size(sign: SceneObject, rng: SeededRandom) -> Fact:
    n = int(sign.text)
    wordings = {
        "Is the number in the image greater than 4?": n > 4,
        "Is the number in the image less than 5?": n < 5,
        "Is the number in the image even?": n % 2 == 0,
        "Is the number in the image odd?": n % 2 == 1,
    }
    question = rng.choice(tuple(wordings))
    return yes_no("number_size", question, wordings[question])


@on_sign(NUMBERS)
def _sum(sign: SceneObject, rng: SeededRandom) -> Fact:
    added = rng.between(1, 3)
    total = int(sign.text) + added
    question = f"What is the number in the image plus {added}?"
    return Fact("sum", question, str(total), near_numbers(rng, total, added, 9 + added))


@on_sign(NUMBERS)
def _is_sum(sign: SceneObject, rng: SeededRandom) -> Fact:
    added = rng.between(1, 3)
    total = int(sign.text) + added
    yes = rng.chance(50)
    stated = total if yes else rng.choice([m for m in range(added, 10 + added) if m != total])
    return yes_no("is_sum", f"Is the number in the image plus {added} equal to {stated}?", yes)


@on_sign(NUMBERS)
def _code(sign: SceneObject, rng: SeededRandom) -> Fact:
    n = int(sign.text)
    codes = {"n > 4": n > 4, "n < 5": n < 5, "n % 2 == 0": n % 2 == 0, "n % 2 == 1": n % 2 == 1}
    code = rng.choice(tuple(codes))
    if rng.chance(50):
        question = f"Let n be the number in the image. What does print({code}) output?"
        return Fact("code", question, str(codes[code]), (str(not codes[code]),))
    question = f"Let n be the number in the image. Does print({code}) output True?"
    return yes_no("code", question, codes[code])


KNOWLEDGE_FORMS = named(
    _category, _is_category, _sound, _is_french, _fruit, _corners, _number_size, _sum, _is_sum, _code
)
