"""MMMU guesses an option if it cannot find one in an answer; here the guess depends only on the question.

The builtin scoring draws from the process's random state, in threads, so that the score of the same answers varies from
run to run and with the number of processes.
"""

from __future__ import annotations

import random
import threading
from typing import Any

from lmms_eval.tasks.mmmu import utils

_lock = threading.Lock()


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The builtin scoring, with a random state that is seeded by the question's id."""
    with _lock:
        state = random.getstate()
        random.seed(str(doc["id"]))
        try:
            return utils.mmmu_process_results(doc, results)
        finally:
            random.setstate(state)
