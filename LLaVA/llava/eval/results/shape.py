"""The format of results on disk, and a sentence on what deviates from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

FORMAT = 1
"""Of what is written now, under "format" in every results.json; results without one are older, and read as well."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0)]
Whole = Annotated[int, Field(gt=-(2**63), lt=2**63)]
PartOfName = Annotated[str, Field(pattern=r"^[^/*?\[\]]*$")]


class Mean(TypedDict):
    mean: Finite


class Spread(TypedDict):
    min: Finite
    mean: Finite
    max: Finite


class Cost(TypedDict):
    pruned: Positive
    unpruned: Positive


class VisualTokens(TypedDict):
    total: TypedDict("Total", {"mean": Positive})
    kept: Mean
    per_layer: NotRequired[list[Finite] | None]
    flops_ratio: NotRequired[TypedDict("Ratios", {"literature": Finite, "exact": Finite}) | None]


class CountedTokens(TypedDict):
    images: Positive
    total: Spread
    kept: Spread
    per_layer: NotRequired[list[Finite] | None]
    flops: NotRequired[TypedDict("Flops", {"literature": Cost, "exact": Cost}) | None]


class Task(TypedDict):
    # lmms-eval's numbers; what is not one of the table's may be nan.
    metrics: dict[str, float]
    visual_tokens: NotRequired[VisualTokens | None]
    samples: NotRequired[Whole]
    visual_cache: NotRequired[TypedDict("Cache", {"hits": NotRequired[Whole], "misses": NotRequired[Whole]}) | None]
    throughput: NotRequired[
        TypedDict("Speed", {"avg_latency": NotRequired[float], "avg_encoding_latency": NotRequired[float]}) | None
    ]
    date: NotRequired[PartOfName]


class TaskResult(Task):
    """The result of one task, as a run stores it."""

    visual_tokens: CountedTokens | None
    samples: Whole


class Pruning(TypedDict):
    method: str
    ratio: Finite | None
    layer: Whole | None
    options: dict[str, Any]
    set_options: NotRequired[list[str]]


class Results(TypedDict):
    """The results of one model under one pruning configuration."""

    suite: str
    model: str
    trained: bool
    pruning: Pruning | None
    grey: NotRequired[bool]
    limit: Whole | None
    visual_tokens: VisualTokens | None
    tasks: dict[str, Task]
    failed: dict[str, str]
    timing: NotRequired[
        TypedDict("Timing", {"selection_ms": NotRequired[Finite | None], "prefill_ms": NotRequired[Finite | None]})
        | None
    ]


class Manifest(TypedDict, total=False):
    versions: dict[str, str | None]
    tasks: list[str]
    jobs: list[str]


class WholeRun(TypedDict):
    runs: list[Any]


TASK_RESULT, RESULTS, MANIFEST, WHOLE_RUN = map(TypeAdapter, (TaskResult, Results, Manifest, WholeRun))


def check(content: Any, shape: TypeAdapter) -> None:
    """Refuse what does not have a shape; further entries are allowed.

    The `ValueError` says what is missing, or where which value is and what belongs there; or that a later version wrote
    it.
    """
    version = content.get("format", 0) if isinstance(content, Mapping) else 0
    if version not in range(FORMAT + 1):
        raise ValueError(f"it has format {_shown(version)}, and this version of llava reads formats up to {FORMAT}")
    try:
        shape.validate_python(content, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        *inside, last = found["loc"] or ("it",)
        place = ".".join(map(str, inside))
        if found["type"] == "missing":
            raise ValueError(f"{place or 'it'} has no {last}") from None
        where = ".".join(filter(None, (place, str(last))))
        raise ValueError(f"{where} is {_shown(found['input'])}: {found['msg'][0].lower()}{found['msg'][1:]}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
