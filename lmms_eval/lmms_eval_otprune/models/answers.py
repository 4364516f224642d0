"""Records answers on disk, a line each, so that an interrupted run can resume."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmms_eval_otprune.models.token_counts import ImageCount, PromptCount

SYNC_INTERVAL = 1.0
"""Seconds. To wait for the disk after every batch takes longer than small models answer."""


@dataclass(frozen=True)
class Question:
    """All that an answer depends on besides the model and the pruning configuration.

    Attributes
    ----------
    task, split : str
    doc_id : int or str
        The document's place in the data set.
    repeat : int
        How often the question was asked before in this run.
    prompt : str
        The text handed over by lmms-eval, before the conversation template.
    settings : dict
        Generation settings, JSON-serialisable.
    seed : int, or None
        Of the random state, if the answer is sampled.
    """

    task: str
    split: str
    doc_id: int | str
    repeat: int
    prompt: str
    settings: dict[str, Any]
    seed: int | None = None

    def fields(self) -> dict[str, Any]:
        """What identifies the question in the log, with a digest of the prompt."""
        return {**asdict(self), "prompt": hashlib.sha256(self.prompt.encode()).hexdigest()[:16]}


def count_repeats(questions: Iterable[Question | None]) -> list[Question | None]:
    """The questions with ``repeat`` counted up where one is asked again; None stays None."""
    asked: Counter[str] = Counter()
    counted = []
    for question in questions:
        if question is not None:
            identity = repr(question)
            question = replace(question, repeat=asked[identity])
            asked[identity] += 1
        counted.append(question)
    return counted


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question.

    Attributes
    ----------
    text : str
    input_tokens : int
        Tokens that entered the language model: text, and the visual tokens of the first decoder layer.
    output_tokens : int
        Generated tokens, the end-of-sequence token included.
    visual_tokens : tuple of ImageCount
        One for each image of the prompt.
    """

    text: str
    input_tokens: int
    output_tokens: int
    visual_tokens: tuple[ImageCount, ...]

    @property
    def prompt(self) -> PromptCount:
        """The prompt as the decoder saw it."""
        text = self.input_tokens - sum(image.entering for image in self.visual_tokens)
        return PromptCount(text, self.visual_tokens)


class AnswerLog:
    """Answers of one model under one pruning configuration, kept in ``folder/answers_rank<N>.jsonl``.

    Every rank appends to its own file and reads all of them, so a run may resume with another number of processes.
    Lines of older versions, without counts per decoder layer, are skipped.

    Parameters
    ----------
    folder : Path, or None
        None: nothing is recorded.
    rank : int
        This process.
    model, pruning : str
        Fingerprints. Answers with others stay in the file and are never returned.
    """

    def __init__(self, folder: Path | None, rank: int, model: str, pruning: str):
        self._identity = {"model": model, "pruning": pruning}
        self._path: Path | None = None
        self._synced = 0.0
        self._answers: dict[str, Answer] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("answers_rank*.jsonl")):
                self._answers.update(self._read(path))
            self._path = folder / f"answers_rank{rank}.jsonl"
            _end_with_newline(self._path)

    def get(self, question: Question) -> Answer | None:
        """The recorded answer, or None."""
        return self._answers.get(self._key(question.fields()))

    def append(self, pairs: Iterable[tuple[Question, Answer]]) -> None:
        """Write answers; a process that is killed after that has lost none, a machine those of the last second."""
        if self._path is None:
            return
        lines = []
        for question, answer in pairs:
            fields = question.fields()
            self._answers[self._key(fields)] = answer
            lines.append(json.dumps({**fields, **self._identity, **asdict(answer)}, ensure_ascii=False) + "\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            if time.monotonic() - self._synced >= SYNC_INTERVAL:
                os.fsync(file.fileno())
                self._synced = time.monotonic()

    def _key(self, fields: dict[str, Any]) -> str:
        return json.dumps({**fields, **self._identity}, sort_keys=True, default=str)

    def _read(self, path: Path) -> Iterator[tuple[str, Answer]]:
        # Not splitlines: an answer may contain U+2028 or U+0085, which do not end a line of JSON.
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            # A process killed while writing leaves an incomplete line.
            try:
                record = json.loads(line)
                answer = Answer(
                    record.pop("text"),
                    record.pop("input_tokens"),
                    record.pop("output_tokens"),
                    tuple(_image_count(**image) for image in record.pop("visual_tokens")),
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if {name: record.get(name) for name in self._identity} == self._identity:
                yield self._key(record), answer


def _image_count(total: int, runs: list[list[int]], crops: int, after: list[list[int]] | None = None) -> ImageCount:
    return ImageCount(total, _pairs(runs), crops, None if after is None else _pairs(after))


def _pairs(runs: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((layers, tokens) for layers, tokens in runs)


def _end_with_newline(path: Path) -> None:
    """End an incomplete last line, so that the next answer starts on a new one."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
