"""Questions that show the effect of pruning: one about objects, one about text, one about something small.

They are found in the logs of finished runs, with the answers of every row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from PIL import Image

from llava.benchmarks import BENCHMARKS, Benchmark
from llava.eval.results.rows import UNPRUNED, Row
from llava.eval.results.samples import read_log
from llava.eval.token_page import Answer

BY_KEY = {column.key: column for column in BENCHMARKS}
RULE = (
    "Each is the first question of its kind that the unpruned model answers right and the methods answer differently, "
    "by more than yes or no; where there is none, the first by yes or no, or the first that the unpruned model answers "
    "right."
)


class Kind(NamedTuple):
    """A kind of question: the benchmarks to look in, the best first, and what the question must match."""

    name: str
    columns: tuple[str, ...]
    pattern: str


KINDS = (
    Kind("Objects", ("GQA", "POPE"), r"\b(what|which|is there|are there)\b"),
    Kind(
        "Text", ("SEED-I", "MMB", "MME-P", "OKVQA", "GQA"), r"\b(word|text|written|writing|read|sign|say|says|logo)\b"
    ),
    Kind("Something small", ("GQA", "SEED-I", "MMB", "POPE"), r"\b(small|tiny|little)\b"),
)


@dataclass(frozen=True)
class Example:
    """A question with its image (RGB), and what each row answered, in the order of the rows."""

    kind: str
    benchmark: str
    question: str
    truth: str
    image: Image.Image
    answers: tuple[Answer, ...]


def find_examples(rows: Sequence[Row]) -> tuple[list[Example], list[str]]:
    """One example of each kind, of different images, from the logs of one model's rows and the data.

    Of several seeds of a row the first is shown. Also returns why a kind has no example.
    """
    examples: list[Example] = []
    missing = []
    tasks: dict[str, Any] = {}
    for kind in KINDS:
        try:
            found = next(_examples(kind, rows, tasks, [example.image for example in examples]), None)
        except (ImportError, OSError, ValueError) as error:
            found, reason = None, str(error)
        else:
            reason = "no benchmark in the runs asks about it"
        if found is None:
            missing.append(f"an example of {kind.name.lower()}: {reason}")
        else:
            examples.append(found)
    return examples, missing


def _examples(
    kind: Kind, rows: Sequence[Row], tasks: dict[str, Any], known: Sequence[Image.Image]
) -> Iterator[Example]:
    """Candidates, the most telling first."""
    found = []
    for key in kind.columns:
        task = BY_KEY[key].task_in(rows[0].runs[0].tasks)
        logs = [_by_document(row, BY_KEY[key]) for row in rows]
        for document in sorted(set.intersection(*map(set, logs))):
            samples = [log[document] for log in logs]
            if re.search(kind.pattern, _question(samples[0]["input"]), re.IGNORECASE):
                found.append((_rank(rows, samples), key, task, document, samples))
    for _, key, task, document, samples in sorted(filter(lambda one: one[0] is not None, found), key=itemgetter(0)):
        prompt = samples[0]["input"]
        image = _image(task, document, prompt, tasks)
        if image is None or any(image == other for other in known):
            continue
        answers = tuple(Answer(_spelt(_said(sample), prompt), _right(sample)) for sample in samples)
        yield Example(kind.name, key, _question(prompt), _spelt(str(samples[0]["target"]), prompt), image, answers)


def _by_document(row: Row, column: Benchmark) -> dict[int, Mapping[str, Any]]:
    """A row's samples by document; empty without a log."""
    path = row.runs[0].log(column)
    return {
        sample["doc_id"]: sample
        for sample in (read_log(path) if path else ())
        if isinstance(sample, dict)
        and isinstance(sample.get("doc_id"), int)
        and isinstance(sample.get("input"), str)
        and "target" in sample
    }


def _rank(rows: Sequence[Row], samples: Sequence[Mapping[str, Any]]) -> int | None:
    """0 if the methods answer differently by more than yes or no, 1 if they do by yes or no, 2 if they all agree.

    None if the unpruned model's answer is wrong.
    """
    right = [_right(sample) for sample in samples]
    if any(row.method == UNPRUNED and not one for one, row in zip(right, rows, strict=True)):
        return None
    if len({one for one, row in zip(right, rows, strict=True) if row.pruned}) < 2:
        return 2
    return int(_plain(str(samples[0]["target"])) in ("yes", "no"))


def _said(sample: Mapping[str, Any]) -> str:
    said = sample.get("filtered_resps", "")
    while isinstance(said, list):
        said = said[0] if said else ""
    return str(said).strip()


def _right(sample: Mapping[str, Any]) -> bool:
    return _plain(_said(sample)) == _plain(str(sample["target"]))


def _plain(text: str) -> str:
    return re.sub(r"[^\w ]", "", text).strip().lower()


def _question(prompt: str) -> str:
    """The question itself, without options and instructions."""
    lines = []
    for line in prompt.replace("<image>", "").strip().splitlines():
        if re.match(r"(\(?[A-Z][.):]|Answer|Please answer|Options)", line.strip()):
            break
        lines.append(line.strip())
    return re.sub(r"\s*There are several options:?$", "", " ".join(lines).strip())


def _spelt(answer: str, prompt: str) -> str:
    """The answer, with the option that a letter stands for."""
    letter = _plain(answer)
    if len(letter) != 1 or not letter.isalpha():
        return answer
    option = re.search(rf"^\(?{letter}[.):]+\s*(\S.*)$", prompt, re.IGNORECASE | re.MULTILINE)
    return f"{letter.upper()}: {option[1].strip()}" if option else answer


def _image(task: str, document: int, prompt: str, tasks: dict[str, Any]) -> Image.Image | None:
    """The image of a benchmark's document, or None if it has several; its data must be those of the run."""
    from llava.benchmark_tasks import load_tasks

    if task not in tasks:
        tasks |= load_tasks(task)
    documents = tasks[task].eval_docs
    if document >= len(documents):
        return None
    asked = documents[document]
    if tasks[task].doc_to_text(asked) != prompt:
        raise ValueError(f"the data of {task} are not those that the runs were asked about")
    images = tasks[task].doc_to_visual(asked)
    return images[0].convert("RGB") if len(images) == 1 else None
