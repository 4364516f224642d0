"""A failed run of ``python -m lmms_eval`` ends with status 1.

The command catches whatever a run raises, logs it and exits with status 0, so that a script cannot tell failure from
success. Here its log message of the failure makes it exit with status 1.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from loguru import logger

from lmms_eval_otprune.models.command_line import started_from_command_line

if TYPE_CHECKING:
    from loguru import Record

FAILURES = ("Error during evaluation", "Could not save")
TOKEN_HINT = (
    "The data set is asked for with a Hugging Face login: run `hf auth login`, or evaluate the same benchmarks without "
    "one: --include_path lmms_eval/lmms_eval_otprune/tasks --tasks otprune_paper."
)


def fail_loudly() -> None:
    """Let lmms-eval's command end with status 1 when its run failed. Does nothing in other programs."""
    if started_from_command_line():
        logger.configure(patcher=_stop_on_failure)


def _stop_on_failure(record: Record) -> None:
    message = record["message"]
    if not message.startswith(FAILURES):
        return
    if "LocalTokenNotFoundError" in message:
        message = f"{message}\n{TOKEN_HINT}"
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(1)
