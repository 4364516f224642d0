"""The frame of every command line: options that mean the same everywhere, and one sentence for a wrong value.

Imports nothing beyond the standard library, so that ``--help`` and a wrong value do not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llava.files import system_errors
from llava.runtime import print_everything

if TYPE_CHECKING:
    from llava.pruning import PruningConfig

EMBEDDED = "llava-mini"
RATIO = 0.098
WRONG, INTERRUPTED, UNREAD = 2, 130, 141
"""Exit statuses: a request that cannot be met; Ctrl-C; nobody reads the output any more."""
EXPECTED = (ImportError, OSError, ValueError, IndexError, FloatingPointError)
"""Errors whose message is for the user; any other exception is a defect and keeps its traceback."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong value in one sentence and exits with status 2.

    Parameters
    ----------
    module : str
        The command's module, such as ``llava.eval.tokens``; errors begin with its name, or with ``llava tokens``.
    description : str
        Its first line is shown by ``--help``.
    """

    def __init__(self, module: str = "", description: str | None = "", **options: Any):
        options.setdefault("prog", sys.argv[0] if sys.argv[0].startswith("llava ") else f"python -m {module}")
        super().__init__(description=(description or "").strip().partition("\n")[0], **options)

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, with ``--max_new_tokens`` for ``--max-new-tokens``: LLaVA's scripts use both spellings."""
        given = [self._spelt(text) for text in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(given, namespace)

    def _spelt(self, text: str) -> str:
        name, equals, value = text.partition("=")
        spelt = name.replace("_", "-")
        return spelt + equals + value if name.startswith("--") and spelt in self._option_string_actions else text

    def run(self, action: Callable[[argparse.Namespace], object], argv: Sequence[str] | None = None) -> int:
        """Parse the command line and call ``action`` with the result.

        Returns
        -------
        int
            The status that ``action`` returns, 0 if it is not an int; 2 after an error, which is printed on standard
            error; 130 after Ctrl-C; 141 if the reader of its output went away, as with ``| head``.
        """
        print_everything()
        arguments = self.parse_args(argv)
        try:
            with system_errors():
                status = action(arguments)
            print(end="", flush=True)
        except BrokenPipeError:
            return end_quietly()
        except EXPECTED as error:
            print(f"{self.prog}: {error}", file=sys.stderr)
            return WRONG
        except KeyboardInterrupt:
            print(f"\n{self.prog}: interrupted", file=sys.stderr)
            return INTERRUPTED
        return status if type(status) is int else 0

    def add_model(
        self, default: str | None = EMBEDDED, also: str = "", dest: str = "model", base: bool = False
    ) -> None:
        """``--model`` (``--model-path`` in LLaVA's scripts), and with ``base`` also ``--model-base``."""
        about = f"{also}checkpoint folder, hub id or {EMBEDDED} (default: {default})"
        self.add_argument("--model", "--model-path", dest=dest, default=default, metavar="MODEL", help=about)
        if base:
            of = "language model that a LoRA or projector-only checkpoint is put on"
            self.add_argument("--model-base", metavar="MODEL", help=of)

    def add_image(self, dest: str = "image", required: bool = True, about: str = "", several: bool = False) -> None:
        """``--image`` (``--image-file`` in LLaVA's scripts); ``several`` for a list."""
        about = about or f"a local file or an http(s) address{', or several in one prompt' if several else ''}"
        more: dict[str, Any] = {"nargs": "+"} if several else {}
        self.add_argument("--image", "--image-file", dest=dest, required=required, metavar="FILE", help=about, **more)

    def add_method(self, default: str | None, about: str = "") -> None:
        """``--method``: one or more methods with options, for `read_methods`."""
        help_ = "methods with their options, such as otprune:gamma=0.05,random:seed=1 (see llava methods; "
        self.add_argument(
            "--method", default=default, metavar="NAME[,NAME]", help=f"{about}{help_}default: {default or 'none'})"
        )

    def add_query(self) -> None:
        """``--query``, for methods that look at the question."""
        about = "question, for methods that look at it (default: %(default)s)"
        self.add_argument("--query", default="Describe the image.", type=text, help=about)

    def add_ratio(self, default: float | None = RATIO) -> None:
        """``--ratio``: the kept ratio of methods that do not state one."""
        help_ = f"kept ratio, 0 < r <= 1 (default: {default})" if default else "kept ratio, 0 < r <= 1"
        self.add_argument("--ratio", type=ratio, default=default, metavar="R", help=help_)

    def add_device(self, default: str | None = None, about: str = "") -> None:
        """``--device``; None means a GPU if there is one (`find_device`)."""
        help_ = f"{about}cpu, cuda or cuda:1 (default: {default or 'a GPU if there is one'})"
        self.add_argument("--device", type=device, default=default, help=help_)

    def add_output(self, default: str | None, folder: bool = False, force: str = "") -> None:
        """``--output``, and with ``force`` (its help text) also ``--force``."""
        kind, help_ = ("DIR", "folder for the results") if folder else ("FILE", "file to write")
        help_ = f"{help_} (default: {default or 'standard output'})"
        self.add_argument(
            "--output", type=Path, default=None if default is None else Path(default), metavar=kind, help=help_
        )
        if force:
            self.add_argument("--force", action="store_true", help=force)


def end_quietly() -> int:
    """The exit status after a `BrokenPipeError`; what is still to be printed goes nowhere, instead of failing again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UNREAD


def read_methods(text: str, kept: float | None, environ: dict[str, str] | None = None) -> dict[str, PruningConfig]:
    """The configurations in the value of ``--method``, by their text; see `PruningConfig.from_text`.

    Parameters
    ----------
    text : str
        Methods, separated by commas.
    kept : float, optional
        Kept ratio of methods that do not state one.
    environ : dict, optional
        Options not in the text; default: the environment.

    Raises
    ------
    ValueError
        For an unknown method or option, or a wrong value.
    """
    from llava.pruning import PruningConfig

    given = {} if environ is None else {"environ": environ}
    return {part.strip().lower(): PruningConfig.from_text(part.strip(), kept, **given) for part in text.split(",")}


def find_device(name: str | None) -> str:
    """The named device, or else a GPU if there is one.

    Raises
    ------
    ValueError
        For a GPU that this machine does not have.
    """
    import torch

    kind, _, number = (name or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    if kind == "cuda" and not (int(number) < torch.cuda.device_count() if number else torch.cuda.is_available()):
        raise ValueError(f"--device {name}: this machine has no such GPU that PyTorch can use")
    return name or kind


def device(text: str) -> str:
    """A device's name."""
    kind, colon, number = text.partition(":")
    if text not in ("cpu", "mps") and not (kind == "cuda" and number.isdecimal() == bool(colon)):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:NUMBER, not {text!r}")
    return text


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from ``low`` to ``high``."""

    def read(text: str) -> int:
        # int also takes 1_0 for 10, and digits of every script.
        if text.isascii() and text.isdecimal() and low <= int(text) and (high is None or int(text) <= high):
            return int(text)
        allowed = f">= {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"must be a whole number {allowed}, not {text}")

    return read


positive, whole = whole_number(1), whole_number(0)


def not_negative(text: str) -> float:
    """A finite number >= 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number >= 0, not {text}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not {text}")
    return value


def above_zero(text: str) -> float:
    """A finite number > 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, not {text}")
    return value


def ratio(text: str) -> float:
    """A number with 0 < r <= 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number with 0 < r <= 1, not {text}")
    return value


def text(argument: str) -> str:
    """Valid UTF-8 text: other bytes arrive as lone surrogates, which tokenizers do not accept."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be UTF-8, not {argument!a}") from None
    return argument


def _number(text: str) -> float:
    try:
        # float also takes 1_0 for 10, and digits of every script.
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan
