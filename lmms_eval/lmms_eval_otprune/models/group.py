"""Joins the processes of a launch."""

from __future__ import annotations

import os
from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs
from torch import distributed

JOIN = timedelta(minutes=10)
"""Time limit for the processes of a launch to connect."""
WAIT = timedelta(hours=12)
"""Time limit of later collective operations: one process may download a data set, or have hours more work."""


def join() -> Accelerator:
    """Connect to the other processes of this launch, if the environment names any.

    Raises
    ------
    RuntimeError
        If they do not connect within `JOIN`.
    """
    try:
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=JOIN)])
    except distributed.DistError as error:
        rank, size, host, port = map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        raise RuntimeError(
            f"{size} processes were to meet at {host}:{port} within {JOIN.total_seconds() / 60:g} minutes: "
            f"{str(error).strip().splitlines()[0]} Start all of them (this is RANK={rank} of WORLD_SIZE={size}), or "
            "unset these variables if another launch has left them there"
        ) from None
    if distributed.is_initialized():
        distributed.distributed_c10d._set_pg_timeout(WAIT)
    return accelerator
