"""What benchmarks have in common: their tables, and how their questions are drawn and balanced."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any

from PIL import Image

from llava.mini.forms import FORMS, Fact
from llava.mini.questions import QA
from llava.mini.scenes import Scene, render, sample_scene
from llava.mini.seeded_random import WORLD_VERSION, SeededRandom

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
        Column name -> type: see `columns`.
    rows : list of dict
        One value per column; images as ``PIL.Image.Image``.
    prompts : list of str
        For each row the prompt that its task has to make of it; empty for a table of bare images.
    """

    config: str
    split: str
    columns: dict[str, Any]
    rows: list[Row]
    prompts: list[str]


def columns(text: str) -> dict[str, Any]:
    """Column types from ``"name name:type name:[type]"``.

    A type is a name that ``datasets.Value`` takes, string where none is stated, or ``image``; brackets make it a list.
    """
    named = (word.partition(":")[::2] for word in text.split())
    return {name: [kind[1:-1]] if kind.startswith("[") else kind or "string" for name, kind in named}


def table(
    config: str, split: str, types: dict[str, Any], rows: Iterable[tuple[str, Row]], order: str | None = None
) -> Table:
    """A table of pairs of a prompt and the row that has to give it.

    Column types are those of `columns`. A row may leave out a column: its value is then empty, 0 or no image. The rows
    get the fixed random order of the split ``order`` of the world, or keep theirs where it is None.
    """
    rows = list(rows) if order is None else SeededRandom("order", order).shuffled(list(rows))
    full = [{name: row[name] if name in row else _empty(kind) for name, kind in types.items()} for _, row in rows]
    return Table(config, split, types, full, [prompt for prompt, _ in rows])


def _empty(kind: Any) -> Any:
    if isinstance(kind, list):
        return []
    return {"string": "", "image": None}.get(kind, 0)


def scenes_of(split: str) -> Iterator[Scene]:
    """The split's scenes, from seed 0 on, without end."""
    return (sample_scene(seed, split) for seed in count())


@lru_cache(maxsize=16)
def image_of(scene: Scene) -> Image.Image:
    """The scene's image; rows that show the same scene one after the other share it."""
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
    split: str, wanted: dict[str, Any], per_scene: int = 1, fits: Callable[[Fact], bool] = lambda fact: True
) -> Iterator[tuple[Scene, Fact, SeededRandom]]:
    """Facts with balanced answers, at most `per_scene` about one scene; those for which ``fits`` is false are left out.

    ``wanted`` is a number of facts for each form, or a tuple that begins with it.
    """
    quota = Quota({form: n[0] if isinstance(n, tuple) else n for form, n in wanted.items()})
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
    """Makes each letter the right one equally often, for every number of options."""

    def __init__(self) -> None:
        self.given: Counter[int] = Counter()

    def dealt(self, qa: QA) -> QA:
        """The same question with the right option moved to the next letter, by exchanging two options."""
        choices = list(qa.choices)
        here, there = ord(qa.answer) - ord("A"), self.given[len(choices)] % len(choices)
        self.given[len(choices)] += 1
        choices[here], choices[there] = choices[there], choices[here]
        return replace(qa, answer=chr(ord("A") + there), choices=tuple(choices))
