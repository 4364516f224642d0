"""OCRBench's score of one run: lmms-eval's own adds to counters of the whole process, which may evaluate several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def share(results: Sequence[Mapping[str, Any]]) -> float:
    """The share of right answers; lmms-eval's is that of a thousand questions, which OCRBench has."""
    return sum(result["score"] for result in results) / len(results)
