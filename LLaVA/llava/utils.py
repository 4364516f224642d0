"""Small helpers under the names that LLaVA's evaluation and serving scripts import."""

from __future__ import annotations

from llava.legacy import (
    StreamToLogger,
    build_logger,
    moderation_msg,
    pretty_print_semaphore,
    server_error_msg,
    violates_moderation,
)

__all__ = [
    "StreamToLogger",
    "build_logger",
    "disable_torch_init",
    "moderation_msg",
    "pretty_print_semaphore",
    "server_error_msg",
    "violates_moderation",
]


def disable_torch_init() -> None:
    """Do nothing; kept because evaluation scripts call it first.

    It used to switch off the initialisation of layers for the rest of the process, to make models faster. Models are
    made on the meta device now, and a layer made later must not be left with what happened to be in memory.
    """
