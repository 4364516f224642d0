"""Forms that looking at the image answers: what there is, its colour, shape and size, where it is, what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from llava.mini.captions import an
from llava.mini.forms.facts import Fact, named, other_than, yes_no
from llava.mini.forms.naming import APART, INSIDE, about_one, firmly_placed, phrase_for, some_phrase, two_phrases
from llava.mini.scenes import (
    BACKGROUNDS,
    COLORS,
    IMAGE_SIZE,
    NUMBERS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDS,
    Scene,
    SceneObject,
)
from llava.mini.seeded_random import SeededRandom


def _exists(scene: Scene, rng: SeededRandom) -> Fact | None:
    if not scene.shapes:
        return None
    yes, with_color = rng.chance(50), rng.chance(65)
    if yes:
        kinds = present_kinds(scene, with_color)
    else:
        kinds = absent_kinds(scene, with_color, tempting=True) if rng.chance(60) else []
        kinds = kinds or absent_kinds(scene, with_color, tempting=False)
    if not kinds:
        return None
    kind = rng.choice(kinds)
    wordings = ("Is there {} in the image?", "Is there {} in this image?", "Is there {}?")
    return yes_no("exists", rng.choice(wordings).format(an(kind)), yes)


def present_kinds(scene: Scene, with_color: bool) -> list[str]:
    """The kind of each shape in the scene, such as "star" or "red star"."""
    return [f"{thing.color} {thing.shape}" if with_color else thing.shape for thing in scene.shapes]


def absent_kinds(scene: Scene, with_color: bool, tempting: bool) -> list[str]:
    """Kinds of shapes that the scene does not show.

    Tempting ones with a colour have a colour and a shape that are both in the image, only not together.
    """
    shown = {(o.color, o.shape) for o in scene.shapes}
    if not with_color:
        return [s for s in SHAPES if s not in {shape for _, shape in shown}]
    colors = sorted({c for c, _ in shown}) if tempting else list(COLORS)
    shapes = sorted({s for _, s in shown}) if tempting else list(SHAPES)
    return [f"{c} {s}" for c in colors for s in shapes if (c, s) not in shown]


def _both(scene: Scene, rng: SeededRandom) -> Fact | None:
    shown = sorted({o.shape for o in scene.shapes})
    missing = [s for s in SHAPES if s not in shown]
    yes = rng.chance(50)
    if len(shown) < 2 or not missing:
        return None
    pair = rng.sample(shown, 2) if yes else rng.shuffled([rng.choice(shown), rng.choice(missing)])
    return yes_no("both", f"Are there both {an(pair[0])} and {an(pair[1])} in the image?", yes)


def _asks_for(
    attribute: str, options: Iterable[str], *wordings: str, signs: bool = False
) -> Callable[[Scene, SeededRandom], Fact | None]:
    """The form that asks for an attribute of one shape, or also of a sign."""

    @about_one(lambda scene: scene.objects if signs else scene.shapes, hide=(attribute,))
    def form(thing: SceneObject, phrase: str, scene: Scene, rng: SeededRandom) -> Fact:
        answer = getattr(thing, attribute)
        return Fact(attribute, rng.choice(wordings).format(phrase), answer, other_than(options, answer))

    form.__name__ = attribute
    return form


_color = _asks_for(
    *("color", COLORS, "What color is the {}?", "What is the color of the {}?", "Which color does the {} have?"),
    signs=True,
)
_shape = _asks_for("shape", SHAPES, "What is the {}?", "What shape is the {}?", "Which shape is the {}?")
_size = _asks_for("size", SIZES, "How big is the {}?", "What size is the {}?")


@about_one(lambda scene: scene.objects, hide=("color",))
def _is_color(thing: SceneObject, phrase: str, scene: Scene, rng: SeededRandom) -> Fact:
    yes = rng.chance(50)
    nearby = other_than(sorted({o.color for o in scene.objects}), thing.color)
    others = nearby if nearby and rng.chance(50) else other_than(COLORS, thing.color)
    return yes_no("is_color", f"Is the {phrase} {thing.color if yes else rng.choice(others)}?", yes)


Relation = Callable[[SceneObject, SceneObject], bool]


def _left_of(a: SceneObject, b: SceneObject) -> bool:
    return b.center[0] - a.center[0] >= APART


def _above(a: SceneObject, b: SceneObject) -> bool:
    return b.center[1] - a.center[1] >= APART


def _the_other_way_round(holds: Relation, a: SceneObject, b: SceneObject) -> bool:
    return holds(b, a)


RELATIONS: tuple[tuple[str, str, str, str, Relation], ...] = (
    ("left", "right", "to the left of", "to the right of", _left_of),
    ("above", "below", "above", "below", _above),
)


def _relation(scene: Scene, rng: SeededRandom) -> Fact | None:
    """Which side of b is a on: asked as yes or no, or as a choice between the two sides."""
    here, there, preposition, opposite, holds = rng.choice(RELATIONS)
    pair = two_phrases(scene, rng, lambda a, b: holds(a, b) or holds(b, a))
    if pair is None:
        return None
    a, first, b, second = pair
    true = holds(a, b)
    if rng.chance(50):
        asked_here = rng.chance(50)
        question = f"Is the {first} {preposition if asked_here else opposite} the {second}?"
        return yes_no("relation", question, true == asked_here)
    sides = rng.shuffled([preposition, opposite])
    question = f"Is the {first} {sides[0]} or {sides[1]} the {second}?"
    return Fact("relation", question, here if true else there, (there if true else here,))


def _related(scene: Scene, rng: SeededRandom) -> Fact | None:
    """What is the one object on a side of another."""
    _, _, preposition, opposite, holds = rng.choice(RELATIONS)
    if rng.chance(50):
        preposition, holds = opposite, partial(_the_other_way_round, holds)
    for anchor in rng.shuffled(scene.objects):
        others = [o for o in scene.objects if o is not anchor]
        there = [o for o in others if holds(o, anchor)]
        unclear = [o for o in others if not holds(o, anchor) and not holds(anchor, o)]
        name = phrase_for(scene, rng, anchor, hide=("place",))
        if len(there) != 1 or unclear or name is None:
            continue
        if rng.chance(50) and not there[0].is_sign:
            answer, wrong = there[0].shape, other_than(SHAPES, there[0].shape)
            return Fact("related", f"What is {preposition} the {name}?", answer, wrong)
        answer, wrong = there[0].color, other_than(COLORS, there[0].color)
        return Fact("related", f"What color is the object {preposition} the {name}?", answer, wrong)
    return None


def _side(scene: Scene, rng: SeededRandom) -> Fact | None:
    axis = rng.below(2)
    clear = [o for o in scene.objects if abs(o.center[axis] - IMAGE_SIZE // 2) >= 2 * INSIDE]
    found = some_phrase(scene, rng, clear, hide=("place",))
    if found is None:
        return None
    thing, phrase = found
    names = (("left", "right"), ("top", "bottom"))[axis]
    before = thing.center[axis] < IMAGE_SIZE // 2
    answer, wrong = names if before else names[::-1]
    if axis == 0:
        wording = rng.choice(("On which side of the image is the {}?", "Is the {} on the left side or the right side?"))
    else:
        wording = rng.choice(
            ("Is the {} at the top or at the bottom?", "In which half of the image is the {}, top or bottom?")
        )
    return Fact("side", wording.format(phrase), answer, (wrong,))


@about_one(lambda scene: [o for o in scene.objects if firmly_placed(o)], hide=("place",))
def _place(thing: SceneObject, phrase: str, scene: Scene, rng: SeededRandom) -> Fact:
    wording = rng.choice(("Where in the image is the {}?", "Where is the {}?", "In which part of the image is the {}?"))
    return Fact("place", wording.format(phrase), thing.place, other_than(PLACES, thing.place))


@about_one(lambda scene: scene.signs, hide=("text",))
def _read(thing: SceneObject, phrase: str, scene: Scene, rng: SeededRandom) -> Fact:
    alphabet, sort = (NUMBERS, "number") if thing.text in NUMBERS else (WORDS, "word")
    wordings = ("What does the {} say?", "What is written on the {}?", f"What {sort} is on the {{}}?")
    return Fact("read", rng.choice(wordings).format(phrase), thing.text, other_than(alphabet, thing.text))


def _is_text(scene: Scene, rng: SeededRandom) -> Fact | None:
    if not scene.signs:
        return None
    shown = [s.text for s in scene.signs]
    yes = rng.chance(50)
    text = rng.choice(shown)
    alphabet, sort = (NUMBERS, "number") if text in NUMBERS else (WORDS, "word")
    if not yes:
        text = rng.choice([t for t in alphabet if t not in shown])
    wording = rng.choice((f'Is the {sort} "{{}}" in the image?', "Is there a sign that says {}?"))
    return yes_no("is_text", wording.format(text), yes)


def _background(scene: Scene, rng: SeededRandom) -> Fact:
    if rng.chance(50):
        wording = rng.choice(("What color is the background?", "What is the color of the background?"))
        return Fact("background", wording, scene.background, other_than(BACKGROUNDS, scene.background))
    wording = rng.choice(("What pattern does the background have?", "What does the background look like?"))
    return Fact("background", wording, scene.texture, other_than(TEXTURES, scene.texture))


def _is_background(scene: Scene, rng: SeededRandom) -> Fact:
    yes = rng.chance(50)
    if rng.chance(50):
        stated = scene.background if yes else rng.choice(other_than(BACKGROUNDS, scene.background))
    else:
        stated = scene.texture if yes else rng.choice(other_than(TEXTURES, scene.texture))
    return yes_no("is_background", f"Does this image show a {stated} background?", yes)


def larger(scene: Scene, rng: SeededRandom) -> Fact | None:
    """Which of two shapes is larger, or smaller; `llava.mini.forms.with_hint` asks for weights instead."""
    pair = two_phrases(
        scene,
        rng,
        lambda a, b: not a.is_sign and not b.is_sign and a.size != b.size,
        hide=("place", "size"),
    )
    if pair is None:
        return None
    a, first, b, second = pair
    word = rng.choice(("larger", "smaller"))
    right, other = (first, second) if (a.width > b.width) == (word == "larger") else (second, first)
    return Fact("larger", f"Which is {word}, the {first} or the {second}?", right, (other,))


def _same_color(scene: Scene, rng: SeededRandom) -> Fact | None:
    hide = ("color", "place")
    same = two_phrases(scene, rng, lambda a, b: a.color == b.color, hide)
    different = two_phrases(scene, rng, lambda a, b: a.color != b.color, hide)
    # Asked only where both answers were possible, or "no" would be the better guess.
    if same is None or different is None:
        return None
    yes = rng.chance(50)
    _, first, _, second = same if yes else different
    return yes_no("same_color", f"Are the {first} and the {second} the same color?", yes)


PERCEPTION_FORMS = named(
    *(_exists, _both, _color, _is_color, _shape, _size, _relation, _related, _side, _place, _read, _is_text),
    *(_background, _is_background, larger, _same_color),
)
