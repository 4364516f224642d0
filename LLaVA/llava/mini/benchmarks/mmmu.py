"""MMMU: questions with options and open ones, about one image or two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count

from PIL import Image

from llava.mini.benchmarks.table import Letters, Quota, Table, balanced_facts, columns, image_of, table
from llava.mini.forms import PAIR_FORMS, Fact
from llava.mini.questions import QA, as_choice, as_open
from llava.mini.scenes import Scene, sample_scene
from llava.mini.seeded_random import SeededRandom

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
    "pair_exists": (12, "Design"),
    "pair_more": (8, "Math"),
    "pair_background": (8, "Art_Theory"),
    "pair_read": (8, "Literature"),
}
IMAGES = [f"image_{i}" for i in range(1, 8)]


def mmmu_val() -> list[Table]:
    """MMMU: with options and open, 36 of the questions about two images."""
    split = "mmmu_val"
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
        asked.append((qa, subject, subfield, [image_of(scene)]))
    for first, second, fact, rng in _balanced_pairs(split):
        qa = letters.dealt(as_choice(fact, rng, "mmmu"))
        asked.append((qa, MMMU_PAIRS[fact.form][1], "Comparison", [image_of(first), image_of(second)]))

    rows = []
    numbers: Counter[str] = Counter()
    for qa, subject, subfield, images in asked:
        numbers[subject] += 1
        row = {
            "id": f"validation_{subject}_{numbers[subject]}",
            "question": qa.question,
            "options": str(list(qa.choices)),
            **dict(zip(IMAGES, images, strict=False)),
            "img_type": "['Diagrams']",
            "answer": qa.answer,
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice" if qa.choices else "open",
            "subfield": subfield,
        }
        rows.append((qa.prompt, row))
    shown = " ".join(f"{name}:image" for name in IMAGES)
    types = columns(f"id question options explanation {shown} img_type answer topic_difficulty question_type subfield")
    return [table("default", "validation", types, rows, split)]


def _balanced_pairs(split: str) -> Iterator[tuple[Scene, Scene, Fact, SeededRandom]]:
    """Facts about two scenes; their seeds lie beyond those of the questions about one."""
    quota = Quota({form: n for form, (n, _) in MMMU_PAIRS.items()})
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
