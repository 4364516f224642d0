"""Noun phrases that pick out one object of a scene.

Questions about an object have to name it without giving away the answer, and so that it is the only one meant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

from llava.mini.captions import at
from llava.mini.forms.facts import Fact
from llava.mini.scenes import IMAGE_SIZE, SIGN, Scene, SceneObject
from llava.mini.seeded_random import SeededRandom

# Pixels by which two centres must differ for "left of" or "above", and a centre from a border between two places.
APART = 42
INSIDE = 14


def phrases_for(scene: Scene, thing: SceneObject, hide: Sequence[str] = ()) -> list[str]:
    """Noun phrases (without "the") that fit `thing` and no other object, and do not name any attribute in `hide`."""
    if thing.is_sign:
        kin = scene.signs
        ways = [(("shape",), SIGN), (("shape", "color"), f"{thing.color} sign")]
        ways.append((("shape", "text"), f"sign that says {thing.text}"))
    else:
        kin = scene.shapes
        ways = [
            (("shape",), thing.shape),
            (("color", "shape"), f"{thing.color} {thing.shape}"),
            (("size", "shape"), f"{thing.size} {thing.shape}"),
            (("color",), f"{thing.color} shape"),
        ]
    phrases = []
    for attributes, phrase in ways:
        alike = [o for o in kin if all(getattr(o, a) == getattr(thing, a) for a in attributes)]
        if len(alike) == 1 and not set(attributes) & set(hide):
            phrases.append(phrase)
    if not thing.is_sign and "place" not in hide and firmly_placed(thing):
        near = [o for o in kin if o is not thing and (o.place == thing.place or not firmly_placed(o))]
        if not near:
            phrases.append(f"shape {at(thing.place)}")
    return phrases


def phrase_for(scene: Scene, rng: SeededRandom, thing: SceneObject, hide: Sequence[str] = ()) -> str | None:
    """One of `phrases_for`, or None when nothing short picks the object out."""
    phrases = phrases_for(scene, thing, hide)
    return rng.choice(phrases) if phrases else None


def some_phrase(
    scene: Scene, rng: SeededRandom, things: Sequence[SceneObject], hide: Sequence[str] = ()
) -> tuple[SceneObject, str] | None:
    """A random object of `things` that can be named, with a phrase for it."""
    for thing in rng.shuffled(things):
        phrase = phrase_for(scene, rng, thing, hide)
        if phrase is not None:
            return thing, phrase
    return None


def about_one(
    things: Callable[[Scene], Sequence[SceneObject]], hide: Sequence[str]
) -> Callable[[Callable[..., Fact]], Callable[[Scene, SeededRandom], Fact | None]]:
    """Makes a form of a function that states a fact about one of ``things``, given with a phrase and the scene.

    The form states nothing where none of them can be named without an attribute in ``hide``.
    """

    def wrap(state: Callable[..., Fact]) -> Callable[[Scene, SeededRandom], Fact | None]:
        @wraps(state)
        def form(scene: Scene, rng: SeededRandom) -> Fact | None:
            found = some_phrase(scene, rng, things(scene), hide)
            return None if found is None else state(*found, scene, rng)

        return form

    return wrap


def two_phrases(
    scene: Scene, rng: SeededRandom, fits: Callable[[SceneObject, SceneObject], bool], hide: Sequence[str] = ("place",)
) -> tuple[SceneObject, str, SceneObject, str] | None:
    """A random ordered pair of nameable objects for which `fits` holds, each with a phrase."""
    things = rng.shuffled(scene.objects)
    for a in things:
        for b in things:
            if a is not b and fits(a, b):
                first, second = phrase_for(scene, rng, a, hide), phrase_for(scene, rng, b, hide)
                if first is not None and second is not None:
                    return a, first, b, second
    return None


def firmly_placed(thing: SceneObject) -> bool:
    """Whether the centre lies clear of the borders between places, so that its place is beyond doubt."""
    return all(abs(c - border) >= INSIDE for c in thing.center for border in (IMAGE_SIZE // 3, 2 * IMAGE_SIZE // 3))
