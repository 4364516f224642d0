"""A table in sentences: which method leads at a budget, by how much, and whether that may be chance."""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.results.evidence import Comparison
from llava.eval.results.formats import SIGNIFICANT
from llava.eval.results.rows import MEAN, Row, same_budget


def findings(rows: Sequence[Row]) -> list[str]:
    """Sentences on the relative means of a table's rows, up to three for each budget that several methods share.

    They carry 95 % intervals if the rows have evidence.
    """
    several = len({row.model for row in rows if not row.published}) > 1
    said = []
    for group in same_budget(row for row in rows if row.relative is not None):
        if len(group) > 1:
            sentences = _of_a_budget(sorted(group, key=lambda row: -row.relative))
            said += [f"{group[0].model}: {sentence}" if several else sentence for sentence in sentences]
    return said


def _of_a_budget(rows: Sequence[Row]) -> list[str]:
    """Of rows that keep equally many tokens, the best first."""
    first, second = rows[:2]
    kept = "this budget"
    if first.kept_tokens is not None:
        kept = f"{100 * first.kept_tokens / first.total_tokens:.1f} % of the visual tokens"
    score = f"{first.relative:.1f} % of the unpruned score{_range(*first.interval(MEAN))}"
    compared = first.evidence and first.evidence.best_other
    after = f"{first.relative - second.relative:.1f} points behind" if compared is None else _points(compared)
    said = [f"At {kept} {first.label} leads with {score}.", f"{second.label} is {after}."]
    random = first.evidence and first.evidence.random.get(MEAN)
    if random and second.family != "random":
        others = [row for row in rows if row.family == "random"]
        name = others[0].label if len(others) == 1 else "the mean of random's seeds"
        said.append(f"{name[0].upper()}{name[1:]} is {_points(random)}.")
    return said


def _points(compared: Comparison) -> str:
    chance = "" if compared.p < SIGNIFICANT else ", which may be chance"
    return f"{compared.difference:.1f} points behind{_range(compared.low, compared.high)}{chance}"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None else f" [{low:.1f}, {high:.1f}]"
