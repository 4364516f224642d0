"""One progress bar: samples, time left, samples a second, and the visual tokens kept in the mean over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from lmms_eval_otprune.models.token_counts import ImageCount

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

    def __init__(self, label: str, total: int, done: int, file: TextIO | None = None):
        self._images = 0
        self._total_tokens = 0
        self._kept_tokens = 0.0
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

    def advance(self, samples: int, images: Sequence[ImageCount]) -> None:
        """Count finished samples and their images; tokens are shown as means over the images."""
        self._images += len(images)
        self._total_tokens += sum(image.total for image in images)
        self._kept_tokens += sum(image.kept for image in images)
        if self._images:
            kept, total = self._kept_tokens / self._images, self._total_tokens / self._images
            self._bar.set_postfix_str(f"visual tokens {kept:.4g}/{total:.4g}", refresh=False)
        self._bar.update(samples)
