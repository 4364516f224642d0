"""Forms about two images."""

from __future__ import annotations

from llava.mini.captions import an
from llava.mini.forms.facts import Fact, named
from llava.mini.scenes import Scene
from llava.mini.seeded_random import SeededRandom

FIRST, SECOND = "the first image", "the second image"


def _which_image(form: str, question: str, first: bool) -> Fact:
    answer, wrong = (FIRST, SECOND) if first else (SECOND, FIRST)
    return Fact(form, question, answer, (wrong,))


def _pair_exists(a: Scene, b: Scene, rng: SeededRandom) -> Fact | None:
    first = rng.chance(50)
    shown, hidden = (a, b) if first else (b, a)
    with_color = rng.chance(60)
    name = (lambda o: f"{o.color} {o.shape}") if with_color else (lambda o: o.shape)
    kinds = sorted({name(o) for o in shown.shapes} - {name(o) for o in hidden.shapes})
    if not kinds:
        return None
    question = f"<image 1> <image 2> Which image shows {an(rng.choice(kinds))}?"
    return _which_image("pair_exists", question, first)


def _pair_more(a: Scene, b: Scene, rng: SeededRandom) -> Fact | None:
    if abs(len(a.objects) - len(b.objects)) < 2:
        return None
    question = "<image 1> <image 2> Which image shows more objects?"
    return _which_image("pair_more", question, len(a.objects) > len(b.objects))


def _pair_background(a: Scene, b: Scene, rng: SeededRandom) -> Fact | None:
    first = rng.chance(50)
    shown, hidden = (a, b) if first else (b, a)
    if shown.background == hidden.background:
        return None
    question = f"<image 1> <image 2> Which image has a {shown.background} background?"
    return _which_image("pair_background", question, first)


def _pair_read(a: Scene, b: Scene, rng: SeededRandom) -> Fact | None:
    first = rng.chance(50)
    shown, hidden = (a, b) if first else (b, a)
    texts = sorted({s.text for s in shown.signs} - {s.text for s in hidden.signs})
    if not texts:
        return None
    question = f"<image 1> <image 2> Which image has a sign that says {rng.choice(texts)}?"
    return _which_image("pair_read", question, first)


PAIR_FORMS = named(_pair_exists, _pair_more, _pair_background, _pair_read)
"""Form name -> function of two scenes and a `SeededRandom`; the question names them ``<image 1> <image 2>``."""
