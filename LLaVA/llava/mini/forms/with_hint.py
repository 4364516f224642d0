"""Forms that come with a hint, as science questions do."""

from __future__ import annotations

from llava.mini.forms.facts import Fact, named, other_than
from llava.mini.forms.knowledge import on_sign
from llava.mini.forms.naming import APART, INSIDE, about_one, phrase_for, some_phrase, two_phrases
from llava.mini.forms.perception import larger
from llava.mini.scenes import CATEGORIES, Scene, SceneObject
from llava.mini.seeded_random import SeededRandom

LIVING = (*CATEGORIES["animal"], "tree", "leaf")
LIFELESS = (*CATEGORIES["vehicle"], "stone", "cloud")
POLYGONS = ("square", "triangle", "star", "cross", "diamond")
MAP = "The image is a map. North is at the top and east is on the right."
FEELINGS = {"red": "hot", "blue": "cold", "yellow": "bright", "black": "dark"}


def _compass(scene: Scene, rng: SeededRandom) -> Fact | None:
    def clear(a: SceneObject, b: SceneObject) -> bool:
        dx, dy = abs(a.center[0] - b.center[0]), abs(a.center[1] - b.center[1])
        return max(dx, dy) >= 2 * APART and max(dx, dy) >= 2 * min(dx, dy)

    pair = two_phrases(scene, rng, clear)
    if pair is None:
        return None
    a, first, b, second = pair
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    answer = ("east" if dx > 0 else "west") if abs(dx) > abs(dy) else ("south" if dy > 0 else "north")
    question = f"In which direction is the {first} from the {second}?"
    return Fact("compass", question, answer, other_than(("north", "east", "south", "west"), answer), MAP)


def _farthest(scene: Scene, rng: SeededRandom) -> Fact | None:
    phrases = [(o, phrase_for(scene, rng, o, hide=("place",))) for o in rng.shuffled(scene.objects)]
    named = [(o, phrase) for o, phrase in phrases if phrase is not None][:3]
    if len(named) < 3:
        return None
    direction, axis, sign = rng.choice((("north", 1, 1), ("south", 1, -1), ("west", 0, 1), ("east", 0, -1)))
    ranked = sorted(named, key=lambda pair: sign * pair[0].center[axis])
    if abs(ranked[0][0].center[axis] - ranked[1][0].center[axis]) < 2 * INSIDE:
        return None
    wrong = tuple(f"the {phrase}" for _, phrase in ranked[1:])
    return Fact("farthest", f"Which of these is farthest {direction}?", f"the {ranked[0][1]}", wrong, MAP)


def _heavier(scene: Scene, rng: SeededRandom) -> Fact | None:
    fact = larger(scene, rng)
    if fact is None:
        return None
    word = "most" if "larger" in fact.question else "least"
    hint = "All shapes are made of the same material. A larger shape weighs more."
    return Fact("heavier", f"Which of these weighs the {word}?", f"the {fact.answer}", (f"the {fact.wrong[0]}",), hint)


@on_sign(LIVING + LIFELESS)
def _living(sign: SceneObject, rng: SeededRandom) -> Fact:
    answer, wrong = ("living", "not living") if sign.text in LIVING else ("not living", "living")
    hint = "Animals and plants are living things. Vehicles, stones and water are not."
    return Fact("living", "Is the thing that the word names living or not living?", answer, (wrong,), hint)


def _polygon(scene: Scene, rng: SeededRandom) -> Fact | None:
    straight = some_phrase(scene, rng, [o for o in scene.shapes if o.shape in POLYGONS], hide=("shape",))
    curved = some_phrase(scene, rng, [o for o in scene.shapes if o.shape not in POLYGONS], hide=("shape",))
    # Asked only where both answers were possible: most shapes are polygons.
    if straight is None or curved is None:
        return None
    answer, wrong = rng.shuffled(["a polygon", "not a polygon"])
    named = straight if answer == "a polygon" else curved
    hint = "A polygon is a shape with straight sides only."
    return Fact("polygon", f"Which describes the {named[1]}?", answer, (wrong,), hint)


@about_one(lambda scene: [o for o in scene.shapes if o.color in FEELINGS], hide=("color",))
def _feeling(thing: SceneObject, phrase: str, scene: Scene, rng: SeededRandom) -> Fact:
    answer = FEELINGS[thing.color]
    hint = "Red shapes are hot, blue shapes are cold, yellow shapes are bright and black shapes are dark."
    return Fact("feeling", f"Which word describes the {phrase}?", answer, other_than(FEELINGS.values(), answer), hint)


FORMS_WITH_HINT = named(_compass, _farthest, _heavier, _living, _polygon, _feeling)
