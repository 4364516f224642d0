"""What the runner needs of a model besides lmms-eval's interface: the model is loaded once for several rows."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms
from tqdm import tqdm

from llava.pruning import PruningConfig
from llava.runtime import is_main_process
from lmms_eval_otprune.models import cache_key
from lmms_eval_otprune.models.answers import Answer, AnswerLog, Question
from lmms_eval_otprune.models.token_counts import PromptCount

if TYPE_CHECKING:
    from llava.flops import ModelShape

UNPRUNED = "none"
_TERMINAL_INTERVAL, _LOG_INTERVAL = 0.2, 20.0
"""Seconds between two states of a progress bar; where nobody watches, a line now and then is enough."""


class RowsInTurn(lmms):
    """The base of lmms-eval models that the runner can use; also a mixin before lmms-eval's own wrappers.

    Attributes
    ----------
    label : str
        Of the progress bar.
    open_progress : callable
        (label, samples, samples done) -> context manager of an object with ``update(samples)``.
    keep_model : bool
        `clean` frees nothing, because another run follows.
    visual_tokens : dict
        Task -> how often each `PromptCount` was answered, answers of an earlier run included.
    model_fingerprint, pruning_fingerprint : str
        What answers depend on besides the question.
    """

    keep_model = False
    model_fingerprint = ""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label = type(self).__name__
        self.open_progress: Callable[[str, int, int], AbstractContextManager[Any]] = _progress_bar
        self.visual_tokens: dict[str, Counter[PromptCount]] = defaultdict(Counter)

    def set_pruning(self, config: PruningConfig | None) -> None:
        """Prune from now on as ``config`` states; None: not at all."""
        raise NotImplementedError

    def model_shape(self) -> ModelShape | None:
        """The sizes that the cost of a prefill depends on; None for a model whose cost cannot be counted."""
        return None

    def visual_cache_counts(self) -> Counter[str]:
        """Images found in the cache so far, "hits", and images encoded, "misses"; empty without a cache."""
        return Counter()

    def _start(self, folder: str | None, writer: int, model: str, pruning: PruningConfig | None) -> None:
        """Open the log of answers of a model, given its fingerprint, with one pruning configuration."""
        self.model_fingerprint = model
        self.pruning_fingerprint = UNPRUNED if pruning is None else pruning.fingerprint()
        cache_key.extend_with(f"{model}|{self.pruning_fingerprint}")
        path = None if folder is None else Path(folder)
        self._answers = AnswerLog(path, writer, model, self.pruning_fingerprint)

    def _answer_all(
        self,
        questions: Sequence[Question | None],
        answer: Callable[[Mapping[int, Question]], Iterable[tuple[Sequence[int], Sequence[Answer]]]],
    ) -> list[Answer | None]:
        """The answer to every question: the recorded one, or a new one, which is on disk before the next batch starts.

        Parameters
        ----------
        questions : sequence of Question or None
            None for a padding request.
        answer : callable
            From unanswered questions by their position to batches of (positions, answers).
        """
        found = [None if question is None else self._answers.get(question) for question in questions]
        todo = {i: question for i, question in enumerate(questions) if question is not None and found[i] is None}
        total = sum(question is not None for question in questions)
        with self.open_progress(self.label, total, total - len(todo)) as progress:
            for positions, answers in answer(todo):
                self._answers.append((todo[i], new) for i, new in zip(positions, answers, strict=True))
                for i, new in zip(positions, answers, strict=True):
                    found[i] = new
                progress.update(len(positions))
        for question, one in zip(questions, found, strict=True):
            if question is not None and one is not None:
                self.visual_tokens[question.task][one.prompt] += 1
        return found

    def clean(self) -> None:
        """Free the memory after a run, unless another one follows."""
        if not self.keep_model:
            super().clean()


def _progress_bar(label: str, total: int, done: int) -> tqdm:
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=" samples",
        disable=not is_main_process(),
        mininterval=_TERMINAL_INTERVAL if sys.stderr.isatty() else _LOG_INTERVAL,
    )
