"""Values of a command line, checked as they are read: types for argparse."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """A whole number >= 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, not {text}")
    return int(text)


def whole(text: str) -> int:
    """A whole number >= 0."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, not {text}")
    return int(text)


def above_zero(text: str) -> float:
    """A number > 0."""
    try:
        value = float(text) if "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number > 0, not {text}")
    return value


def text(argument: str) -> str:
    """Text that was UTF-8: other bytes come from the system as lone surrogates, which no tokenizer takes."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be UTF-8, not {argument!a}") from None
    return argument
