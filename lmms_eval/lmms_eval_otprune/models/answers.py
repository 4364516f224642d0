"""Answers on disk, one line each, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmms_eval_otprune.models.token_counts import ImageCount, PromptCount


@dataclass(frozen=True)
class Question:
    """All that an answer depends on besides the model and the pruning configuration.

    Attributes
    ----------
    task, split : str
    doc_id : int or str
        The document's place in the data set.
    repeat : int
        0 for the first time this question is asked in a run, 1 for the second, ...
    prompt : str
        The text handed over by lmms-eval, before the conversation template.
    settings : dict
        Generation settings, JSON-serialisable.
    seed : int, or None
        Of the process's random state, for an answer that is sampled.
    """

    task: str
    split: str
    doc_id: int | str
    repeat: int
    prompt: str
    settings: dict[str, Any]
    seed: int | None = None

    def fields(self) -> dict[str, Any]:
        """What identifies the question in a line of the log; the prompt as a digest."""
        return {**asdict(self), "prompt": hashlib.sha256(self.prompt.encode()).hexdigest()[:16]}


@dataclass(frozen=True)
class Answer:
    """What the model gave for one question.

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
        """What was answered, as the decoder saw it."""
        text = self.input_tokens - sum(image.entering for image in self.visual_tokens)
        return PromptCount(text, self.visual_tokens)


class AnswerLog:
    """Answers of one model under one pruning configuration, kept in ``folder/answers_rank<N>.jsonl``.

    Every rank appends to its own file and reads all of them: a run may continue with another number of processes.
    Lines that do not say what each decoder layer saw, as older versions wrote them, are passed over.

    Parameters
    ----------
    folder : Path, or None
        None keeps nothing.
    rank : int
        This process.
    model, pruning : str
        Fingerprints. Answers given under others are left alone and never returned.
    """

    def __init__(self, folder: Path | None, rank: int, model: str, pruning: str):
        self._identity = {"model": model, "pruning": pruning}
        self._path = None if folder is None else folder / f"answers_rank{rank}.jsonl"
        self._answers: dict[str, Answer] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("answers_rank*.jsonl")):
            self._answers.update(self._read(path))
        _end_with_newline(self._path)

    def get(self, question: Question) -> Answer | None:
        """The recorded answer, or None."""
        return self._answers.get(self._key(question.fields()))

    def append(self, pairs: Iterable[tuple[Question, Answer]]) -> None:
        """Write answers and return when they are on the disk."""
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
            os.fsync(file.fileno())

    def _key(self, fields: dict[str, Any]) -> str:
        return json.dumps({**fields, **self._identity}, sort_keys=True, default=str)

    def _read(self, path: Path) -> Iterator[tuple[str, Answer]]:
        # Not splitlines: an answer may hold U+2028 or U+0085, which end no line of JSON.
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            # A process that is killed while it writes leaves half a line.
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
    """Close a torn last line, so that the next answer begins a line of its own."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
