"""One progress bar: samples, time left, samples a second, and the share of visual tokens kept."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

# Where nobody watches, a line now and then is enough.
_TERMINAL_INTERVAL, _LOG_INTERVAL = 0.2, 20.0


class Progress:
    """A bar over all samples of this process.

    Parameters
    ----------
    label : str
    total : int
        Samples.
    done : int
        Samples that need no work any more; they count neither in the speed nor in the tokens.
    file : text stream, or None
        Where to draw; None draws nothing.
    """

    def __init__(self, label: str, total: int, done: int, file: TextIO | None):
        self._total_tokens = 0
        self._kept_tokens = 0
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit=" samples",
            file=file,
            disable=file is None,
            mininterval=_TERMINAL_INTERVAL if file is not None and file.isatty() else _LOG_INTERVAL,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, samples: int, visual_tokens: Sequence[tuple[int, int]]) -> None:
        """Count finished samples and the (total, kept) visual tokens of their images."""
        self._total_tokens += sum(total for total, _ in visual_tokens)
        self._kept_tokens += sum(kept for _, kept in visual_tokens)
        if self._total_tokens:
            self._bar.set_postfix_str(f"visual tokens {self._kept_tokens}/{self._total_tokens}", refresh=False)
        self._bar.update(samples)
