"""The methods to compare, read from a command line."""

from __future__ import annotations

from collections.abc import Sequence

from llava.command import read_methods as read
from llava.pruning import PruningConfig

UNPRUNED, PUBLISHED = "unpruned", "published"


def read_methods(texts: Sequence[str], ratio: float) -> dict[str, PruningConfig]:
    """Label -> configuration, as `llava.command.read_methods` reads them.

    "published" is OTPrune's published code, and ``NAME@LAYER`` is ``NAME:layer=LAYER``.
    """
    found = {}
    for text in texts:
        name, at, layer = text.partition("@")
        if at and not layer.isdecimal():
            raise ValueError(f"a method is NAME or NAME@LAYER, not {text!r}")
        stated = "otprune:compat=1" if text == PUBLISHED else f"{name}:layer={layer}" if at else name
        [found[text]] = read(stated, ratio, {}).values()
    return found
