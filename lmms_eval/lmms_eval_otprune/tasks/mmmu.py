"""MMMU guesses an option when it cannot read one from an answer; here the guess depends on the question alone.

The builtin draws from the process's random state, in threads: the score of one and the same set of answers then varies
from run to run and with the number of processes.
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
