"""Forms that count."""

from __future__ import annotations

from llava.mini.captions import COUNT_WORDS, PLURALS
from llava.mini.forms.facts import Fact, named, near_numbers, yes_no
from llava.mini.scenes import COLORS, SHAPES, SIZES, Scene
from llava.mini.seeded_random import SeededRandom

# Of a thousand kinds of a sort that a scene of this world shows, how many it shows once, twice, ... eight times.
COUNT_SHARES = {
    "shape": (673, 196, 76, 36, 17, 2, 0, 0),
    "color": (728, 187, 53, 21, 10, 1, 0, 0),
    "color shape": (878, 73, 27, 15, 8, 0, 0, 0),
    "small": (384, 274, 183, 94, 47, 14, 2, 0),
    "medium": (360, 281, 187, 99, 53, 16, 3, 0),
    "large": (625, 269, 89, 18, 0, 0, 0, 0),
    "shapes": (127, 175, 186, 178, 146, 107, 60, 22),
    "signs": (668, 332, 0, 0, 0, 0, 0, 0),
    "objects": (63, 130, 171, 189, 161, 135, 91, 60),
}


def countable_kinds(scene: Scene) -> dict[str, dict[str, int]]:
    """Sort of kind -> plural noun phrase -> how many of it the scene shows.

    Plain shapes, colours and sizes that the scene lacks are listed with 0; a coloured shape only if it is shown.
    """
    shapes = scene.shapes
    pairs = {(o.color, o.shape) for o in shapes}
    return {
        "shape": {PLURALS[shape]: sum(o.shape == shape for o in shapes) for shape in SHAPES},
        "color": {f"{color} shapes": sum(o.color == color for o in shapes) for color in COLORS},
        "color shape": {
            f"{color} {PLURALS[shape]}": sum((o.color, o.shape) == (color, shape) for o in shapes)
            for color, shape in sorted(pairs)
        },
        **{size: {f"{size} shapes": sum(o.size == size for o in shapes)} for size in SIZES},
        "shapes": {"shapes": len(shapes)},
        "signs": {"signs": len(scene.signs)},
        "objects": {"objects": len(scene.objects)},
    }


def _count(scene: Scene, rng: SeededRandom) -> Fact:
    kinds = {kind: n for sort in countable_kinds(scene).values() for kind, n in sort.items()}
    # The number first, so that small numbers are not what most questions ask for.
    n = rng.choice(sorted(set(kinds.values())))
    kind = rng.choice([k for k, number in kinds.items() if number == n])
    wording = rng.choice(("How many {} are there?", "How many {} are there in the image?", "How many {} are shown?"))
    return Fact("count", wording.format(kind), str(n), near_numbers(rng, n, 0, 8))


def _is_count(scene: Scene, rng: SeededRandom) -> Fact | None:
    """True and false numbers are equally frequent for every kind: a false one is as frequent as that number is true."""
    sorts = {sort: {k: n for k, n in kinds.items() if n} for sort, kinds in countable_kinds(scene).items()}
    sort = rng.choice([sort for sort, kinds in sorts.items() if kinds])
    kind, n = rng.choice(tuple(sorts[sort].items()))
    other = n + rng.choice((-1, 1))
    shares = (0, *COUNT_SHARES[sort], 0)
    # Take n and its neighbour as often as the rarer of the two occurs; then either may be the one that is stated.
    if rng.below(shares[n]) >= shares[other]:
        return None
    yes = rng.chance(50)
    stated = n if yes else other
    if stated == 1:
        return yes_no("is_count", f"Is there exactly one {_singular(kind)} in the image?", yes)
    wording = rng.choice(("Are there exactly {} {} in the image?", "Are there {} {} in this image?"))
    return yes_no("is_count", wording.format(COUNT_WORDS[stated], kind), yes)


def _singular(kind: str) -> str:
    return kind.removesuffix("es") if kind.endswith("crosses") else kind.removesuffix("s")


def _more(scene: Scene, rng: SeededRandom) -> Fact | None:
    counts = {PLURALS[s]: sum(o.shape == s for o in scene.shapes) for s in SHAPES}
    shown = [kind for kind, n in counts.items() if n]
    pairs = [(a, b) for a in shown for b in shown if counts[a] > counts[b]]
    if not pairs:
        return None
    more, fewer = rng.choice(pairs)
    first, second = rng.shuffled([more, fewer])
    if rng.chance(50):
        return yes_no("more", f"Are there more {first} than {second} in the image?", first == more)
    return Fact("more", f"Which are there more of, {first} or {second}?", more, (fewer,))


COUNTING_FORMS = named(_count, _is_count, _more)
