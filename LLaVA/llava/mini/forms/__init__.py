"""The kinds of questions that can be asked about scenes.

A form is a function that looks at a scene and states a `Fact`, or None where the scene does not allow it; it draws what
is open (which object, which words, yes or no) from the seeded stream that it is given.
"""

from __future__ import annotations

from collections.abc import Callable

from llava.mini.captions import CAPTION_PROMPT, DENSE_PROMPT, caption_references, dense_caption
from llava.mini.forms.counting import COUNTING_FORMS
from llava.mini.forms.facts import Fact
from llava.mini.forms.knowledge import KNOWLEDGE_FORMS
from llava.mini.forms.pairs import PAIR_FORMS
from llava.mini.forms.perception import PERCEPTION_FORMS
from llava.mini.forms.texts import TEXT_FORMS
from llava.mini.forms.with_hint import FORMS_WITH_HINT
from llava.mini.scenes import Scene
from llava.mini.seeded_random import SeededRandom

__all__ = ["FORMS", "PAIR_FORMS", "TEXT_FORMS", "Fact"]


def _caption(scene: Scene, rng: SeededRandom) -> Fact:
    return Fact("caption", CAPTION_PROMPT, rng.choice(caption_references(scene)))


def _dense(scene: Scene, rng: SeededRandom) -> Fact:
    return Fact("dense", DENSE_PROMPT, dense_caption(scene))


FORMS: dict[str, Callable[[Scene, SeededRandom], Fact | None]] = {
    "caption": _caption,
    "dense": _dense,
    **PERCEPTION_FORMS,
    **COUNTING_FORMS,
    **KNOWLEDGE_FORMS,
    **FORMS_WITH_HINT,
}
"""Form name -> function of a scene and a `SeededRandom` that states a fact, or None where there is none to state."""
