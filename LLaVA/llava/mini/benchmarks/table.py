"""What benchmarks have in common: their tables, and how their questions are drawn and balanced."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

from PIL import Image

from llava.mini.forms import FORMS, Fact
from llava.mini.questions import QA
from llava.mini.scenes import WORLD_VERSION, Scene, SeededRandom, render, sample_scene

__all__ = [
    "SOURCE",
    "Letters",
    "Quota",
    "Row",
    "Table",
    "balanced_facts",
    "picture",
    "scenes_of",
    "shuffled",
    "table",
]

SOURCE = f"llava-mini world {WORLD_VERSION}"


Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """One parquet file of a benchmark.

    Attributes
    ----------
    config, split : str
        Names under which the data set is loaded.
    columns : dict
        Column name -> type: a name that ``datasets.Value`` takes, ``"image"``, a one-element list of a type, or a
        dict of types.
    rows : list of dict
        One value a column; images as ``PIL.Image.Image``.
    prompts : list of str
        For each row the prompt that its task has to make of it; empty for a table of bare images.
    """

    config: str
    split: str
    columns: dict[str, Any]
    rows: list[Row]
    prompts: list[str]


def scenes_of(split: str) -> Iterator[Scene]:
    """The split's scenes, from seed 0 on, without end."""
    return (sample_scene(seed, split) for seed in count())


@lru_cache(maxsize=16)
def picture(scene: Scene) -> Image.Image:
    """The scene's picture; rows that show the same scene one after the other share it."""
    return render(scene)


class Quota:
    """How many facts of each form are still wanted, and which answers have been given."""

    def __init__(self, wanted: dict[str, int]) -> None:
        self.wanted = dict(wanted)
        self.left = dict(wanted)
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)

    @property
    def open(self) -> bool:
        """Whether any fact is still wanted."""
        return any(self.left.values())

    def forms(self, rng: SeededRandom) -> list[str]:
        """The forms that still lack facts, those that lack the largest share first."""
        lacking = [form for form in rng.shuffled(tuple(self.left)) if self.left[form]]
        return sorted(lacking, key=lambda form: -self.left[form] / self.wanted[form])

    def take(self, fact: Fact | None) -> bool:
        """Count the fact, unless there is none or its answer was given more often than the others it stands among."""
        if fact is None:
            return False
        given = self.answers[fact.form]
        slack = 0 if len(fact.wrong) == 1 else 1
        if fact.wrong and given[fact.answer] > min(given[other] for other in fact.wrong) + slack:
            return False
        given[fact.answer] += 1
        self.left[fact.form] -= 1
        return True


def balanced_facts(
    split: str, wanted: dict[str, int], per_scene: int = 1, fits: Callable[[Fact], bool] = lambda fact: True
) -> Iterator[tuple[Scene, Fact, SeededRandom]]:
    """Facts of the wanted forms with balanced answers, at most `per_scene` a scene."""
    quota = Quota(wanted)
    for scene in scenes_of(split):
        rng = SeededRandom("facts", split, scene.seed)
        taken = 0
        for form in quota.forms(rng):
            fact = FORMS[form](scene, rng)
            if fact is not None and fits(fact) and quota.take(fact):
                yield scene, fact, rng
                taken += 1
            if taken == per_scene:
                break
        if not quota.open:
            return


class Letters:
    """Sees to it that right options stand behind all letters in turn, for every number of options."""

    def __init__(self) -> None:
        self.given: Counter[int] = Counter()

    def dealt(self, qa: QA) -> QA:
        """The same question with the right option moved to the next letter, by exchanging two options."""
        choices = list(qa.choices)
        here, there = ord(qa.answer) - ord("A"), self.given[len(choices)] % len(choices)
        self.given[len(choices)] += 1
        choices[here], choices[there] = choices[there], choices[here]
        return QA(qa.form, qa.style, qa.question, chr(ord("A") + there), tuple(choices), qa.hint)


def shuffled(rows: list[tuple[str, Row]], split: str) -> list[tuple[str, Row]]:
    """The rows in the split's fixed random order."""
    return SeededRandom("order", split).shuffled(rows)


def table(config: str, split: str, columns: dict[str, Any], rows: Iterable[tuple[str, Row]]) -> Table:
    """A table of pairs of a prompt and the row that has to give it."""
    prompts, values = zip(*rows, strict=True)
    return Table(config, split, columns, list(values), list(prompts))
