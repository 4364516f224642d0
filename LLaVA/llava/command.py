"""The frame of every command line: options that mean the same everywhere, and a wrong value answered in one sentence.

Imports nothing beyond the standard library, so that ``--help`` and a wrong value do not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llava.runtime import print_everything

if TYPE_CHECKING:
    from llava.pruning import PruningConfig

EMBEDDED = "llava-mini"
RATIO = 0.098
WRONG, INTERRUPTED = 2, 130
"""Exit statuses: something that was asked for cannot be had; Ctrl-C."""
EXPECTED = (ImportError, OSError, ValueError, IndexError, FloatingPointError)
"""What a command raises, with a sentence for the user; everything else is a defect and keeps its traceback."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong value with one sentence and status 2.

    Parameters
    ----------
    module : str
        The command's module, ``llava.eval.tokens``: errors begin with its name, or with ``llava tokens``.
    description : str
        Shown by ``--help``; of a docstring the first line.
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
        """Parse the command line and act on it.

        Returns
        -------
        int
            The status that ``action`` returns, 0 for anything but a whole number; 2 after a wrong value, which is
            named on standard error; 130 after Ctrl-C.
        """
        print_everything()
        arguments = self.parse_args(argv)
        try:
            status = action(arguments)
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
        """``--model``, which LLaVA's scripts call ``--model-path``, and where asked ``--model-base``."""
        about = f"{also}checkpoint folder, hub id or {EMBEDDED} (default: {default})"
        self.add_argument("--model", "--model-path", dest=dest, default=default, metavar="MODEL", help=about)
        if base:
            of = "language model that a LoRA or projector-only checkpoint is put on"
            self.add_argument("--model-base", metavar="MODEL", help=of)

    def add_image(self, dest: str = "image", required: bool = True, about: str = "", several: bool = False) -> None:
        """``--image``, which LLaVA's scripts call ``--image-file``; ``several`` for a list."""
        about = about or f"a local file or an http(s) address{', or several in one prompt' if several else ''}"
        more: dict[str, Any] = {"nargs": "+"} if several else {}
        self.add_argument("--image", "--image-file", dest=dest, required=required, metavar="FILE", help=about, **more)

    def add_method(self, default: str | None, about: str = "") -> None:
        """``--method``: one or more, with options; read with `read_methods`."""
        help_ = "methods with their options, such as otprune:gamma=0.05,random:seed=1 (see llava methods; "
        self.add_argument(
            "--method", default=default, metavar="NAME[,NAME]", help=f"{about}{help_}default: {default or 'none'})"
        )

    def add_query(self) -> None:
        """``--query``, for methods that look at the question."""
        about = "question, for methods that look at it (default: %(default)s)"
        self.add_argument("--query", default="Describe the image.", type=text, help=about)

    def add_ratio(self, default: float | None = RATIO) -> None:
        """``--ratio``: the kept ratio of every method that has none of its own."""
        help_ = f"kept ratio, 0 < r <= 1 (default: {default})" if default else "kept ratio, 0 < r <= 1"
        self.add_argument("--ratio", type=ratio, default=default, metavar="R", help=help_)

    def add_device(self, default: str | None = None, about: str = "") -> None:
        """``--device``; None is a GPU where there is one (`find_device`)."""
        help_ = f"{about}cpu, cuda or cuda:1 (default: {default or 'a GPU if there is one'})"
        self.add_argument("--device", type=device, default=default, help=help_)

    def add_output(self, default: str | None, folder: bool = False, force: str = "") -> None:
        """``--output``, and where something finished is not replaced unasked ``--force``."""
        kind, help_ = ("DIR", "folder for the results") if folder else ("FILE", "file to write")
        help_ = f"{help_} (default: {default or 'standard output'})"
        self.add_argument(
            "--output", type=Path, default=None if default is None else Path(default), metavar=kind, help=help_
        )
        if force:
            self.add_argument("--force", action="store_true", help=force)


def read_methods(text: str, kept: float | None, environ: dict[str, str] | None = None) -> dict[str, PruningConfig]:
    """The configurations that ``--method`` names, by their text: see `PruningConfig.from_text`.

    Parameters
    ----------
    text : str
        Methods, with commas between.
    kept : float, optional
        Kept ratio of those that state none.
    environ : dict, optional
        Options that the text leaves out; the environment unless given.

    Raises
    ------
    ValueError
        Names what is wrong, and what is allowed.
    """
    from llava.pruning import PruningConfig

    given = {} if environ is None else {"environ": environ}
    return {part.strip().lower(): PruningConfig.from_text(part.strip(), kept, **given) for part in text.split(",")}


def find_device(name: str | None) -> str:
    """A device that is there: the one named, or a GPU if there is one.

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
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number > 0, not {text}")
    return value


def ratio(text: str) -> float:
    """A number with 0 < r <= 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number with 0 < r <= 1, not {text}")
    return value


def text(argument: str) -> str:
    """Text that was UTF-8: other bytes come from the system as lone surrogates, which no tokenizer takes."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be UTF-8, not {argument!a}") from None
    return argument


def _number(text: str) -> float:
    try:
        return float(text) if "_" not in text else math.nan
    except ValueError:
        return math.nan
