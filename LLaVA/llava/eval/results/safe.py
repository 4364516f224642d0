"""The safe ratio: the smallest kept ratio of those run whose score does not fall below a share of the unpruned one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava.benchmarks import shown_columns
from llava.eval.results.formats import MISSING, Cells
from llava.eval.results.rows import MEAN, Row

SAFE = 0.99
NONE = "none of those run"
_ROUNDING = 1e-6


@dataclass(frozen=True)
class SafeRatios:
    """Of one method.

    Attributes
    ----------
    method : str
        With its options and place, without the ratio.
    tried : tuple of float
        Kept ratios that were run, ascending.
    ratios : dict of float or None
        By column key and "Mean", the smallest safe one, or None; columns without intervals are missing.
    """

    model: str
    method: str
    tried: tuple[float, ...]
    ratios: dict[str, float | None]


def safe_ratios(rows: Sequence[Row], share: float) -> list[SafeRatios]:
    """Each method's safe ratios, for a share of the unpruned score, 0 < share <= 1.

    What counts is the lower end of the 95 % interval of the score relative to unpruned, both drawn on the same
    questions; if no row has such an interval, it is a `ValueError`.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.pruned and not row.published and row.ratio is not None:
            groups.setdefault((row.model, row.series), []).append(row)
    found = []
    for (model, method), group in groups.items():
        several, ratios = sorted(group, key=lambda row: row.ratio), {}
        for row in several:
            for key, (low, _) in row.evidence.shares.items() if row.evidence else ():
                safe = row.ratio if low >= 100 * share - _ROUNDING else None
                ratios[key] = safe if ratios.get(key) is None else ratios[key]
        found.append(SafeRatios(model, method, tuple(row.ratio for row in several), ratios))
    if not any(one.ratios for one in found):
        raise ValueError(
            "safe ratios need pruned runs with their logs, beside an unpruned one that was asked the same (of a CSV "
            "table, its columns ..._share_low)"
        )
    return found


def keys_of(found: Sequence[SafeRatios]) -> list[str]:
    """Column keys that safe ratios are known of, in the order of the tables, and "Mean"."""
    known = set().union(*(one.ratios for one in found))
    columns = [column.key for column in shown_columns(known - {MEAN}) if column.key in known]
    return [*columns, MEAN] if MEAN in known else columns


def safe_cells(found: Sequence[SafeRatios]) -> Cells:
    """The table of safe ratios."""
    keys = keys_of(found)
    lines = []
    for one in found:
        ratios = [shown(one.ratios[key]) if key in one.ratios else MISSING for key in keys]
        lines.append([one.model, one.method, ", ".join(f"{ratio:g}" for ratio in one.tried), *ratios])
    return ["Model", "Method", "Ratios run", *keys], lines


def shown(ratio: float | None) -> str:
    """A safe ratio as text."""
    return NONE if ratio is None else f"{ratio:g}"
