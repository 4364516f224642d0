"""The kinds of questions that can be asked about scenes.

A form is a function that looks at a scene and states a `Fact`, or None where the scene does not allow it; it draws what
is open (which object, which words, yes or no) from the dice that it is given.
"""

from __future__ import annotations

from collections.abc import Callable

from llava.mini.captions import CAPTION_PROMPT, DENSE_PROMPT, caption_references, dense_caption
from llava.mini.forms.counting import COUNTING_FORMS
from llava.mini.forms.facts import Fact
from llava.mini.forms.hinted import HINTED_FORMS
from llava.mini.forms.knowing import KNOWING_FORMS
from llava.mini.forms.looking import LOOKING_FORMS
from llava.mini.forms.pairs import PAIR_FORMS
from llava.mini.forms.texts import TEXT_FORMS
from llava.mini.scenes import Dice, Scene

__all__ = ["FORMS", "PAIR_FORMS", "TEXT_FORMS", "Fact"]


def _caption(scene: Scene, dice: Dice) -> Fact:
    return Fact("caption", CAPTION_PROMPT, dice.choice(caption_references(scene)))


def _dense(scene: Scene, dice: Dice) -> Fact:
    return Fact("dense", DENSE_PROMPT, dense_caption(scene))


FORMS: dict[str, Callable[[Scene, Dice], Fact | None]] = {
    "caption": _caption,
    "dense": _dense,
    **LOOKING_FORMS,
    **COUNTING_FORMS,
    **KNOWING_FORMS,
    **HINTED_FORMS,
}
"""Form name -> function of a scene and dice that states a fact, or None where the scene does not allow it."""
