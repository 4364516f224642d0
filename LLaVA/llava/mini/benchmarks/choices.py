"""MMBench, SEED-Bench and ScienceQA."""

from __future__ import annotations

from PIL import Image

from llava.mini.benchmarks.table import SOURCE, Letters, Row, Table, balanced_facts, columns, image_of, table
from llava.mini.forms import TEXT_FORMS
from llava.mini.questions import QA, as_choice
from llava.mini.seeded_random import SeededRandom

INSTANCE = "finegrained_perception (instance-level)"
CROSS_INSTANCE = "finegrained_perception (cross-instance)"

# MMBench form -> number of questions, category and L2 category.
MMBENCH_FORMS = {
    "color": (28, "attribute_recognition", INSTANCE),
    "shape": (20, "attribute_recognition", INSTANCE),
    "size": (12, "attribute_recognition", INSTANCE),
    "place": (28, "object_localization", INSTANCE),
    "count": (20, "object_localization", INSTANCE),
    "read": (24, "ocr", INSTANCE),
    "related": (16, "spatial_relationship", CROSS_INSTANCE),
    "larger": (12, "attribute_comparison", CROSS_INSTANCE),
    "background": (16, "image_scene", "coarse_perception"),
    "category": (12, "identity_reasoning", "attribute_reasoning"),
    "feeling": (12, "physical_property_reasoning", "attribute_reasoning"),
    "compass": (12, "structuralized_imagetext_understanding", "logic_reasoning"),
}


def mmbench_en_dev() -> list[Table]:
    """MMBench: two to four options; without the real set's rotated copies of each question."""
    rows, letters = [], Letters()
    for i, (scene, fact, rng) in enumerate(balanced_facts("mmbench_en_dev", MMBENCH_FORMS)):
        qa = letters.dealt(as_choice(fact, rng, "mmbench"))
        _, category, ability = MMBENCH_FORMS[fact.form]
        row = {
            "index": i,
            "question": qa.question,
            "hint": qa.hint or "nan",
            "answer": qa.answer,
            **dict.fromkeys("ABCD", "nan"),
            **dict(zip("ABCD", qa.choices, strict=False)),
            "category": category,
            "image": image_of(scene),
            "source": SOURCE,
            "L2-category": ability,
            "comment": "nan",
            "split": "dev",
        }
        rows.append((qa.prompt, row))
    types = columns("index:int64 question hint answer A B C D category image:image source L2-category comment split")
    return [table("en", "dev", types, rows, "mmbench_en_dev")]


# SEED-Bench form -> number of questions, and the type that SEED-Bench would number it with.
SEEDBENCH_FORMS = {
    "background": (24, 1),
    "shape": (36, 2),
    "color": (40, 3),
    "place": (32, 4),
    "count": (28, 5),
    "related": (24, 6),
    "fruit": (12, 8),
    "read": (28, 9),
}


def seedbench() -> list[Table]:
    """SEED-Bench: four options; images only, no videos."""
    rows, letters = [], Letters()
    facts = balanced_facts("seedbench", SEEDBENCH_FORMS, fits=lambda fact: len(fact.wrong) >= 3)
    for i, (scene, fact, rng) in enumerate(facts):
        qa = letters.dealt(as_choice(fact, rng, "seedbench", 4))
        row = {
            "answer": qa.answer,
            **{f"choice_{letter}": choice for letter, choice in zip("abcd", qa.choices, strict=True)},
            "data_id": f"{scene.seed:06d}",
            "data_type": "image",
            "question": qa.question,
            "question_id": str(i),
            "question_type_id": SEEDBENCH_FORMS[fact.form][1],
            "image": [image_of(scene)],
        }
        rows.append((qa.prompt, row))
    types = columns(
        "answer choice_a choice_b choice_c choice_d data_id data_type question question_id question_type_id:int16 "
        "image:[image] segment:[int64]"
    )
    return [table("default", "test", types, rows, "seedbench")]


# ScienceQA form -> number of questions, subject, topic and category. Text forms come without an image.
SCIENCEQA_FORMS = {
    "compass": (34, "social science", "geography", "Read a map: cardinal directions"),
    "farthest": (34, "social science", "geography", "Read a map: cardinal directions"),
    "heavier": (24, "natural science", "physics", "Matter and mass"),
    "feeling": (36, "natural science", "physics", "Materials"),
    "living": (20, "natural science", "biology", "Classification"),
    "category": (20, "natural science", "biology", "Classification"),
    "polygon": (20, "natural science", "earth-science", "Shapes"),
    "corners": (16, "natural science", "earth-science", "Shapes"),
}
SCIENCEQA_TEXT = {
    "text_sum": (4, "natural science", "physics", "Numbers"),
    "text_category": (4, "natural science", "biology", "Classification"),
    "text_corners": (4, "natural science", "earth-science", "Shapes"),
    "text_fruit": (4, "natural science", "biology", "Plants"),
    "text_sound": (4, "natural science", "biology", "Animals"),
}


def scienceqa_img() -> list[Table]:
    """ScienceQA: most rows with a hint, twenty without an image."""
    split = "scienceqa_img"
    rows, letters = [], Letters()
    for scene, fact, rng in balanced_facts(split, SCIENCEQA_FORMS):
        qa = letters.dealt(as_choice(fact, rng, "scienceqa"))
        rows.append((qa.prompt, _scienceqa_row(qa, image_of(scene), SCIENCEQA_FORMS[fact.form])))
    rng = SeededRandom("text", split)
    for form, filed in SCIENCEQA_TEXT.items():
        for _ in range(filed[0]):
            qa = letters.dealt(as_choice(TEXT_FORMS[form](rng), rng, "scienceqa"))
            rows.append((qa.prompt, _scienceqa_row(qa, None, filed)))
    types = columns(
        "image:image question choices:[string] answer:int8 hint task grade subject topic category skill lecture "
        "solution"
    )
    return [table("ScienceQA-IMG", "test", types, rows, split)]


def _scienceqa_row(qa: QA, image: Image.Image | None, filed: tuple[int, str, str, str]) -> Row:
    _, subject, topic, category = filed
    return {
        "image": image,
        "question": qa.question,
        "choices": list(qa.choices),
        "answer": ord(qa.answer) - ord("A"),
        "hint": qa.hint,
        "task": "closed choice",
        "grade": "grade1",
        "subject": subject,
        "topic": topic,
        "category": category,
        "skill": qa.form,
    }
