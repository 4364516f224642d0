"""What a form states about a scene: a question, its answer, and answers that would be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llava.mini.seeded_random import SeededRandom


@dataclass(frozen=True)
class Fact:
    """A question, its answer, and answers that are wrong here (the options to choose from; may be empty)."""

    form: str
    question: str
    answer: str
    wrong: tuple[str, ...] = ()
    hint: str = ""


def other_than(options: Iterable[str], answer: str) -> tuple[str, ...]:
    """The options without the answer."""
    return tuple(o for o in options if o != answer)


def near_numbers(rng: SeededRandom, n: int, lowest: int, highest: int) -> tuple[str, ...]:
    """The other three of four numbers in a row that hold `n` anywhere."""
    start = rng.between(max(lowest, n - 3), min(n, highest - 3))
    return tuple(str(m) for m in range(start, start + 4) if m != n)


def yes_no(form: str, question: str, yes: bool, hint: str = "") -> Fact:
    """A fact whose answer is yes or no."""
    return Fact(form, question, "yes" if yes else "no", ("no" if yes else "yes",), hint)


def named(*forms: Callable) -> dict[str, Callable]:
    """Forms by name: that of the function, without the underscore in front."""
    return {form.__name__.lstrip("_"): form for form in forms}
