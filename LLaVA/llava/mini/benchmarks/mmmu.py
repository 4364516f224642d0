"""MMMU: questions with options and open ones, about one picture or two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count

from PIL import Image

from llava.mini.benchmarks.table import Letters, Quota, Table, balanced_facts, picture, shuffled, table
from llava.mini.forms import PAIR_FORMS, Fact
from llava.mini.questions import QA, as_choice, as_open
from llava.mini.scenes import Scene, SeededRandom, sample_scene

__all__ = ["mmmu_val"]

# MMMU form -> (number with options, number of open questions, subject, subfield).
MMMU_FORMS = {
    "count": (16, 16, "Math", "Counting"),
    "sum": (8, 16, "Math", "Arithmetic"),
    "color": (24, 0, "Art", "Colour"),
    "background": (12, 0, "Art_Theory", "Pattern"),
    "shape": (20, 0, "Design", "Form"),
    "place": (20, 0, "Geography", "Position"),
    "read": (12, 16, "Literature", "Reading"),
    "category": (12, 0, "Biology", "Classification"),
    "code": (8, 0, "Computer_Science", "Programming"),
}

MMMU_PAIRS = {
    "pair_exists": (12, "Design", "Comparison"),
    "pair_more": (8, "Math", "Comparison"),
    "pair_background": (8, "Art_Theory", "Comparison"),
    "pair_read": (8, "Literature", "Comparison"),
}


def mmmu_val() -> list[Table]:
    """MMMU: with options and open, 36 of the questions about two images."""
    split = "mmmu_val"
    columns = {
        "id": "string",
        "question": "string",
        "options": "string",
        "explanation": "string",
        **{f"image_{i}": "image" for i in range(1, 8)},
        "img_type": "string",
        "answer": "string",
        "topic_difficulty": "string",
        "question_type": "string",
        "subfield": "string",
    }
    letters = Letters()
    asked: list[tuple[QA, str, str, list[Image.Image]]] = []
    options_left = {form: n for form, (n, *_) in MMMU_FORMS.items()}
    wanted = {form: n + n_open for form, (n, n_open, *_) in MMMU_FORMS.items()}
    for scene, fact, rng in balanced_facts(split, wanted, fits=lambda fact: fact.answer not in ("yes", "no")):
        if options_left[fact.form]:
            options_left[fact.form] -= 1
            qa = letters.dealt(as_choice(fact, rng, "mmmu"))
        else:
            qa = as_open(fact, "mmmu")
        _, _, subject, subfield = MMMU_FORMS[fact.form]
        asked.append((qa, subject, subfield, [picture(scene)]))
    for first, second, fact, rng in _balanced_pairs(split, {form: n for form, (n, *_) in MMMU_PAIRS.items()}):
        qa = letters.dealt(as_choice(fact, rng, "mmmu"))
        _, subject, subfield = MMMU_PAIRS[fact.form]
        asked.append((qa, subject, subfield, [picture(first), picture(second)]))

    rows = []
    numbers: Counter[str] = Counter()
    for qa, subject, subfield, images in asked:
        numbers[subject] += 1
        row = {
            "id": f"validation_{subject}_{numbers[subject]}",
            "question": qa.question,
            "options": str(list(qa.choices)),
            "explanation": "",
            **{f"image_{i}": images[i - 1] if i <= len(images) else None for i in range(1, 8)},
            "img_type": "['Diagrams']",
            "answer": qa.answer,
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice" if qa.choices else "open",
            "subfield": subfield,
        }
        rows.append((qa.prompt, row))
    return [table("default", "validation", columns, shuffled(rows, split))]


def _balanced_pairs(split: str, wanted: dict[str, int]) -> Iterator[tuple[Scene, Scene, Fact, SeededRandom]]:
    """Facts about two scenes; their seeds lie beyond those of the questions about one."""
    quota = Quota(wanted)
    scenes = (sample_scene(seed, split) for seed in count(10**6))
    for first, second in zip(scenes, scenes, strict=False):
        rng = SeededRandom("pairs", split, first.seed)
        for form in quota.forms(rng):
            fact = PAIR_FORMS[form](first, second, rng)
            if quota.take(fact):
                yield first, second, fact, rng
                break
        if not quota.open:
            return
