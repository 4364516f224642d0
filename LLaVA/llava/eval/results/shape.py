"""What results look like on the disk, and a sentence on what does not look like it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FORMAT = 1
"""Of what is written now, under "format" in every results.json; results without one are older, and read as well."""


@dataclass(frozen=True)
class Kind:
    """One kind of value: its name, and which values are of it."""

    name: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """A shape, or null."""

    shape: Any


@dataclass(frozen=True)
class Each:
    """An object whose values have one shape, whatever their keys."""

    shape: Any


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number", lambda value: isinstance(value, int) and _is_number(value))
NUMBER = Kind("a number", _is_number)
FINITE = Kind("a finite number", lambda value: _is_number(value) and math.isfinite(value))
POSITIVE = Kind("a number above 0", lambda value: FINITE.holds(value) and value > 0)
NAME = Kind("part of a file's name", lambda value: isinstance(value, str) and not set(value) & set("/*?[]"))

VISUAL_TOKENS = {
    "total": {"mean": POSITIVE},
    "kept": {"mean": FINITE},
    "per_layer?": Maybe([FINITE]),
    "flops_ratio?": Maybe({"literature": FINITE, "exact": FINITE}),
}
TASK = {
    # lmms-eval's numbers; what is not one of the table's may be nan.
    "metrics": Each(NUMBER),
    "visual_tokens?": Maybe(VISUAL_TOKENS),
    "samples?": WHOLE,
    "visual_cache?": Maybe({"hits?": WHOLE, "misses?": WHOLE}),
    "throughput?": Maybe({"avg_latency?": NUMBER, "avg_encoding_latency?": NUMBER}),
    "date?": NAME,
}
_SPREAD = {"min": FINITE, "mean": FINITE, "max": FINITE}
_COST = {"pruned": POSITIVE, "unpruned": POSITIVE}
TASK_RESULT = {
    **TASK,
    "visual_tokens": Maybe(
        {
            "images": POSITIVE,
            "total": _SPREAD,
            "kept": _SPREAD,
            "per_layer?": Maybe([FINITE]),
            "flops?": Maybe({"literature": _COST, "exact": _COST}),
        }
    ),
    "samples": WHOLE,
}
"""Of one task, as a run leaves it and puts it together with the others."""
PRUNING = {
    "method": TEXT,
    "ratio": Maybe(FINITE),
    "layer": Maybe(WHOLE),
    "options": Kind("an object", lambda value: isinstance(value, dict)),
    "set_options?": [TEXT],
}
RESULTS = {
    "suite": TEXT,
    "model": TEXT,
    "trained": FLAG,
    "pruning": Maybe(PRUNING),
    "grey?": FLAG,
    "limit": Maybe(WHOLE),
    "visual_tokens": Maybe(VISUAL_TOKENS),
    "tasks": Each(TASK),
    "failed": Each(TEXT),
    "timing?": Maybe({"selection_ms?": Maybe(FINITE), "prefill_ms?": Maybe(FINITE)}),
}
WHOLE_RUN = {"runs": [Kind("a run's results", lambda value: True)]}
MANIFEST = {"versions?": Each(Maybe(TEXT)), "tasks?": [TEXT], "jobs?": [TEXT]}


def check(content: Any, shape: Any) -> None:
    """Refuse what does not have a shape; what the shape does not name may be there.

    Raises
    ------
    ValueError
        Says what is missing, or where which value stands and what belongs there; or that a later version wrote it.
    """
    version = content.get("format", 0) if isinstance(content, Mapping) else 0
    if version not in range(FORMAT + 1):
        raise ValueError(f"it has format {_shown(version)}, and this version of llava reads formats up to {FORMAT}")
    _check(content, shape, "it")


def _check(value: Any, shape: Any, place: str) -> None:
    if isinstance(shape, Kind):
        if not shape.holds(value):
            raise ValueError(f"{place} is {_shown(value)}, not {shape.name}")
    elif isinstance(shape, Maybe):
        if value is not None:
            _check(value, shape.shape, place)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{place} is {_shown(value)}, not a list")
        for number, inner in enumerate(value):
            _check(inner, shape[0], f"{place}[{number}]")
    elif not isinstance(value, dict):
        raise ValueError(f"{place} is {_shown(value)}, not an object")
    elif isinstance(shape, Each):
        for name, inner in value.items():
            _check(inner, shape.shape, _inside(place, name))
    else:
        for name, inner in shape.items():
            key = name.removesuffix("?")
            if key in value:
                _check(value[key], inner, _inside(place, key))
            elif key == name:
                raise ValueError(f"{place} has no {key}")


def _inside(place: str, name: str) -> str:
    return name if place == "it" else f"{place}.{name}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
