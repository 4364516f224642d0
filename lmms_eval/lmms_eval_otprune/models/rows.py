"""What the runner needs of a model beside lmms-eval's interface: it is loaded once for several rows of the table."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llava.pruning import PruningConfig
from lmms_eval_otprune.models import cache_key
from lmms_eval_otprune.models.answers import AnswerLog
from lmms_eval_otprune.models.progress import Progress
from lmms_eval_otprune.models.token_counts import PromptCount

UNPRUNED = "none"


class RowsInTurn:
    """A mixin for lmms-eval's models.

    Attributes
    ----------
    label : str
        What a progress bar calls the work.
    open_progress : callable
        (label, samples, samples done) -> `Progress` or alike.
    keep_model : bool
        Another run follows: `clean` frees nothing.
    visual_tokens : dict
        Task -> how often each `PromptCount` was answered, answers of an earlier run included.
    model_fingerprint, pruning_fingerprint : str
        What answers depend on besides the question.
    """

    keep_model = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.label = type(self).__name__
        self.open_progress: Callable[[str, int, int], Progress] = partial(Progress, file=sys.stderr)
        self.visual_tokens: dict[str, Counter[PromptCount]] = defaultdict(Counter)

    def set_pruning(self, config: PruningConfig | None) -> None:
        """Prune as a row of the table does."""
        raise NotImplementedError

    def _start(self, folder: str | None, writer: int, model: str, pruning: PruningConfig | None) -> None:
        """Begin with the answers of a model, by its fingerprint, under one configuration."""
        self.model_fingerprint = model
        self.pruning_fingerprint = UNPRUNED if pruning is None else pruning.fingerprint()
        cache_key.extend_with(f"{model}|{self.pruning_fingerprint}")
        path = None if folder is None else Path(folder)
        self._answers = AnswerLog(path, writer, model, self.pruning_fingerprint)

    def clean(self) -> None:
        """Give the memory back after a run, unless another follows."""
        if not self.keep_model:
            super().clean()
