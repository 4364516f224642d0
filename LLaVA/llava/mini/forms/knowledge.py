"""Forms that join what is seen with something known: words' meanings, fruits' colours, numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llava.mini.captions import an
from llava.mini.forms.facts import Fact, near_numbers, other_than, yes_no
from llava.mini.forms.naming import some_phrase
from llava.mini.scenes import NUMBERS, WORDS, Scene, SceneObject, SeededRandom

__all__ = [
    "CATEGORIES",
    "CATEGORY_OF",
    "CORNERS",
    "CORNER_COUNTS",
    "FRENCH",
    "FRUITS",
    "KNOWLEDGE_FORMS",
    "SOUNDS",
    "only_sign",
]

# As many words in each category, and as many living as lifeless things, so that no answer is the likelier one.
CATEGORIES = {
    "animal": ("cat", "dog", "fox", "cow", "bird", "fish"),
    "food": ("milk", "cake", "apple", "lemon", "bread", "rice"),
    "vehicle": ("car", "bus", "boat", "train", "truck", "bike"),
    "nature": ("sun", "sky", "tree", "leaf", "stone", "cloud"),
}

CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}

SOUNDS = {"cat": "meow", "dog": "bark", "cow": "moo", "bird": "tweet"}

FRENCH = {
    "cat": "chat",
    "dog": "chien",
    "fox": "renard",
    "cow": "vache",
    "bird": "oiseau",
    "fish": "poisson",
    "milk": "lait",
    "apple": "pomme",
    "lemon": "citron",
    "bread": "pain",
    "rice": "riz",
    "car": "voiture",
    "boat": "bateau",
    "truck": "camion",
    "sun": "soleil",
    "sky": "ciel",
    "tree": "arbre",
    "leaf": "feuille",
    "stone": "pierre",
    "cloud": "nuage",
}

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


def only_sign(scene: Scene, texts: Iterable[str]) -> SceneObject | None:
    """The scene's one sign with a word (or with a number, when `texts` are numbers), if its text is in `texts`."""
    texts = tuple(texts)
    alphabet = NUMBERS if texts[0] in NUMBERS else WORDS
    signs = [s for s in scene.signs if s.text in alphabet]
    return signs[0] if len(signs) == 1 and signs[0].text in texts else None


def _category(scene: Scene, rng: SeededRandom) -> Fact | None:
    sign = only_sign(scene, WORDS)
    if sign is None:
        return None
    answer = CATEGORY_OF[sign.text]
    wording = rng.choice(("What kind of thing does the sign name?", "What kind of thing is the word about?"))
    return Fact("category", wording, answer, other_than(CATEGORIES, answer))


def _is_category(scene: Scene, rng: SeededRandom) -> Fact | None:
    sign = only_sign(scene, WORDS)
    if sign is None:
        return None
    answer = CATEGORY_OF[sign.text]
    yes = rng.chance(50)
    told = answer if yes else rng.choice(other_than(CATEGORIES, answer))
    noun = {"food": "food", "nature": "something in nature"}.get(told, an(told))
    return yes_no("is_category", f"Does the word in the image name {noun}?", yes)


def _sound(scene: Scene, rng: SeededRandom) -> Fact | None:
    sign = only_sign(scene, SOUNDS)
    if sign is None:
        return None
    answer = SOUNDS[sign.text]
    return Fact("sound", "What sound does the animal on the sign make?", answer, other_than(SOUNDS.values(), answer))


def _is_french(scene: Scene, rng: SeededRandom) -> Fact | None:
    sign = only_sign(scene, FRENCH)
    if sign is None:
        return None
    yes = rng.chance(50)
    told = FRENCH[sign.text] if yes else rng.choice(other_than(FRENCH.values(), FRENCH[sign.text]))
    return yes_no("is_french", f'Is "{told}" the French translation of the word in the image?', yes)


def _fruit(scene: Scene, rng: SeededRandom) -> Fact | None:
    named = some_phrase(scene, rng, scene.shapes, hide=("color",))
    if named is None:
        return None
    thing, phrase = named
    answer = FRUITS[thing.color]
    return Fact("fruit", f"Which fruit has the color of the {phrase}?", answer, other_than(FRUITS.values(), answer))


def _corners(scene: Scene, rng: SeededRandom) -> Fact | None:
    named = some_phrase(scene, rng, [o for o in scene.shapes if o.shape in CORNERS], hide=("shape",))
    if named is None:
        return None
    thing, phrase = named
    answer = str(CORNERS[thing.shape])
    return Fact("corners", f"How many corners does the {phrase} have?", answer, other_than(CORNER_COUNTS, answer))


def _number_size(scene: Scene, rng: SeededRandom) -> Fact | None:
    sign = only_sign(scene, NUMBERS)
    if sign is None:
        return None
    n = int(sign.text)
    wordings = {
        "Is the number in the image greater than 4?": n > 4,
        "Is the number in the image less than 5?": n < 5,
        "Is the number in the image even?": n % 2 == 0,
        "Is the number in the image odd?": n % 2 == 1,
    }
    question = rng.choice(tuple(wordings))
    return yes_no("number_size", question, wordings[question])


def _sum(scene: Scene, rng: SeededRandom) -> Fact | None:
    sign = only_sign(scene, NUMBERS)
    if sign is None:
        return None
    added = rng.between(1, 3)
    total = int(sign.text) + added
    question = f"What is the number in the image plus {added}?"
    return Fact("sum", question, str(total), near_numbers(rng, total, added, 9 + added))


def _is_sum(scene: Scene, rng: SeededRandom) -> Fact | None:
    sign = only_sign(scene, NUMBERS)
    if sign is None:
        return None
    added = rng.between(1, 3)
    total = int(sign.text) + added
    yes = rng.chance(50)
    told = total if yes else rng.choice([m for m in range(added, 10 + added) if m != total])
    return yes_no("is_sum", f"Is the number in the image plus {added} equal to {told}?", yes)


def _code(scene: Scene, rng: SeededRandom) -> Fact | None:
    sign = only_sign(scene, NUMBERS)
    if sign is None:
        return None
    n = int(sign.text)
    codes = {"n > 4": n > 4, "n < 5": n < 5, "n % 2 == 0": n % 2 == 0, "n % 2 == 1": n % 2 == 1}
    code = rng.choice(tuple(codes))
    if rng.chance(50):
        question = f"Let n be the number in the image. What does print({code}) output?"
        return Fact("code", question, str(codes[code]), (str(not codes[code]),))
    question = f"Let n be the number in the image. Does print({code}) output True?"
    return yes_no("code", question, codes[code])


KNOWLEDGE_FORMS: dict[str, Callable[[Scene, SeededRandom], Fact | None]] = {
    "category": _category,
    "is_category": _is_category,
    "sound": _sound,
    "is_french": _is_french,
    "fruit": _fruit,
    "corners": _corners,
    "number_size": _number_size,
    "sum": _sum,
    "is_sum": _is_sum,
    "code": _code,
}
