"""Captions of scenes: one-sentence references for the caption benchmarks, and a dense one that names everything.

The grammar is small enough for a small model, and its sentences differ as different people's captions of one image
do: in what they name and in what they say about it.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava.mini.scenes import NUMBERS, SHAPES, SIGN, Scene, SceneObject

CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
DENSE_PROMPT = "List everything in the image with its place."

COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
PLURALS = {shape: shape + "s" for shape in SHAPES} | {"cross": "crosses", SIGN: "signs"}

# Pixels by which all of one thing must lie beyond all of another before a caption says on which side it is.
CLEAR = 14


def at(place: str) -> str:
    """A place with its preposition: "top left" -> "in the top left"."""
    if place in ("top", "bottom"):
        return f"at the {place}"
    return f"on the {place}" if place in ("left", "right") else f"in the {place}"


def an(noun: str) -> str:
    """A noun with its article: "orange star" -> "an orange star"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


@dataclass(frozen=True)
class _Unit:
    """What a caption names at once: one object, or all shapes of one colour and kind."""

    members: tuple[SceneObject, ...]

    @property
    def area(self) -> int:
        return sum(o.width * o.height for o in self.members)

    @property
    def place(self) -> str:
        """Where all of it is, or nothing when its members are in several places."""
        places = {o.place for o in self.members}
        return at(places.pop()) if len(places) == 1 else ""

    def noun(self, with_size: bool = False) -> str:
        thing = self.members[0]
        if thing.is_sign:
            says = f"with the number {thing.text}" if thing.text in NUMBERS else f"that says {thing.text}"
            return f"{an(thing.color)} sign {says}"
        sizes = {o.size for o in self.members}
        size = f"{thing.size} " if with_size and len(sizes) == 1 and thing.size != "medium" else ""
        if len(self.members) == 1:
            return an(f"{size}{thing.color} {thing.shape}")
        return f"{COUNT_WORDS[len(self.members)]} {size}{thing.color} {PLURALS[thing.shape]}"


def _units(scene: Scene) -> list[_Unit]:
    """The scene's units, those that cover most first."""
    groups: dict[tuple[str, str, str], list[SceneObject]] = {}
    for thing in scene.objects:
        groups.setdefault((thing.shape, thing.color, thing.text), []).append(thing)
    return sorted((_Unit(tuple(group)) for group in groups.values()), key=lambda u: (-u.area, u.members[0].center))


def _preposition(a: _Unit, b: _Unit) -> str:
    """Where all of a is, seen from all of b: along the axis on which they are farther apart, or just "with"."""
    gaps = {}
    for axis, (before, after) in enumerate((("to the left of", "to the right of"), ("above", "below"))):
        first, second = [o.center[axis] for o in a.members], [o.center[axis] for o in b.members]
        gaps[before] = min(second) - max(first)
        gaps[after] = min(first) - max(second)
    widest = max(gaps, key=gaps.__getitem__)
    return widest if gaps[widest] >= CLEAR else "with"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def caption_references(scene: Scene) -> list[str]:
    """Different one-sentence captions of a scene, eight to ten of them, the plainest first.

    Each names the one to three things that cover most of the image; they differ in what they name and in what
    they say about it: relation, place, size, number or background.
    """
    units = _units(scene)
    a, n = units[0], len(scene.objects)
    ground = f"on a {scene.background} background"
    pattern = f"a {scene.texture} {scene.background} background"
    if len(units) == 1:
        texts = [
            f"{a.noun(True)} {ground}",
            f"{a.noun(True)} on {pattern}",
            f"{a.noun(True)} {a.place} of the image" if a.place else f"{a.noun(True)} in different places",
            f"{a.noun()} {a.place} {ground}".replace("  ", " "),
            f"there is {a.noun(True)} {ground}" if n == 1 else f"there are {a.noun(True)} {ground}",
            f"only {a.noun()} on {pattern}",
            f"{pattern} with {a.noun(True)}",
            f"an image of {a.noun(True)}",
            f"an image of {a.noun()} on {pattern}",
            f"{a.noun(True)} and nothing else {ground}",
        ]
    else:
        b = units[1]
        seen, back = _preposition(a, b), _preposition(b, a)
        third = f"{a.noun()}, {b.noun()} and {units[2].noun()}" if len(units) > 2 else f"only {a.noun()} and {b.noun()}"
        texts = [
            f"{a.noun(True)} {seen} {b.noun(True)} {ground}",
            f"{a.noun(True)} and {b.noun(True)} {ground}",
            f"{b.noun(True)} {back} {a.noun(True)}",
            f"{third} {ground}",
            " and ".join(f"{unit.noun(True)} {unit.place}" for unit in (a, b) if unit.place) or f"{a.noun()} and more",
            f"{a.noun()} {seen} {b.noun()} on {pattern}",
            f"{a.noun(True)} {a.place} of the image" if a.place else f"{a.noun(True)} in different places",
            f"{pattern} with {a.noun()} and {b.noun()}",
            f"{COUNT_WORDS[n]} objects with {a.noun(True)} {seen} {b.noun()}",
            f"an image of {a.noun(True)} with {b.noun()} {ground}",
        ]
    return list(dict.fromkeys(_sentence(text) for text in texts))


def dense_caption(scene: Scene) -> str:
    """All objects with their places, in reading order, and the background.

    For example ``top left: a small red star; center: a medium blue sign that says cat; striped tan background.``
    """
    parts = [f"{thing.place}: {_dense_noun(thing)}" for thing in scene.objects]
    return "; ".join([*parts, f"{scene.texture} {scene.background} background"]) + "."


def _dense_noun(thing: SceneObject) -> str:
    noun = f"a {thing.size} {thing.color} {thing.shape}"
    return f"{noun} that says {thing.text}" if thing.is_sign else noun
