"""POPE and MME."""

from __future__ import annotations

from collections import Counter

from llava.mini.benchmarks.table import SOURCE, Row, Table, columns, image_of, scenes_of, table
from llava.mini.captions import an
from llava.mini.forms import FORMS, Fact
from llava.mini.forms.perception import absent_kinds
from llava.mini.questions import as_open
from llava.mini.scenes import COLORS, SHAPES, Scene
from llava.mini.seeded_random import SeededRandom


def pope() -> list[Table]:
    """POPE: is there such an object? Six questions per image, a yes and a no each way of choosing what is absent.

    ``random``: any kind; ``popular``: one that many other images show; ``adversarial``: one whose colour and shape
    are both in the image, on different objects.
    """
    split = "pope"
    scenes: list[Scene] = []
    for scene in scenes_of(split):
        # Three kinds of at least two colours and two shapes: else there is nothing tempting to ask for.
        kinds = _kinds(scene)
        if len(kinds) >= 3 and absent_kinds(scene, with_color=True, tempting=True):
            scenes.append(scene)
        if len(scenes) == 36:
            break
    shown_in = Counter(kind for scene in scenes for kind in _kinds(scene))
    every = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    popular = sorted(every, key=lambda kind: -shown_in[kind])[: len(every) // 3]
    rows: list[tuple[str, Row]] = []
    for scene in scenes:
        rng = SeededRandom("rows", split, scene.seed)
        kinds = _kinds(scene)
        absent = {"adversarial": rng.choice(absent_kinds(scene, with_color=True, tempting=True))}
        for category, pool in (("popular", popular), ("random", every)):
            absent[category] = rng.choice([k for k in pool if k not in kinds and k not in absent.values()])
        for (category, missing), present in zip(absent.items(), rng.sample(kinds, 3), strict=True):
            for kind, answer in rng.shuffled([(present, "yes"), (missing, "no")]):
                question = f"Is there {an(kind)} in the image?"
                row = {
                    "id": str(len(rows)),
                    "question_id": str(len(rows) + 1),
                    "question": question,
                    "answer": answer,
                    "image_source": f"{SOURCE} {split} {scene.seed}",
                    "image": image_of(scene),
                    "category": category,
                }
                rows.append((as_open(Fact("exists", question, answer)).prompt, row))
    types = columns("id question_id question answer image_source image:image category")
    return [table("default", "test", types, rows, split)]


def _kinds(scene: Scene) -> list[str]:
    return sorted({f"{o.color} {o.shape}" for o in scene.shapes})


# MME category -> (form, number of pairs); the category names are the ones that the metric knows.
MME_FORMS = {
    "existence": (("exists",), 12),
    "count": (("is_count",), 12),
    "position": (("relation",), 12),
    "color": (("is_color",), 12),
    "scene": (("is_background",), 12),
    "OCR": (("is_text",), 12),
    "commonsense_reasoning": (("is_category",), 9),
    "numerical_calculation": (("is_sum", "number_size"), 9),
    "text_translation": (("is_french",), 9),
    "code_reasoning": (("code",), 9),
}


def mme() -> list[Table]:
    """MME: two questions per image, one to be answered with yes and one with no."""
    split = "mme"
    left = {category: n for category, (_, n) in MME_FORMS.items()}
    pairs = []
    for scene in scenes_of(split):
        rng = SeededRandom("rows", split, scene.seed)
        for category in sorted(rng.shuffled([c for c in left if left[c]]), key=lambda c: -left[c] / MME_FORMS[c][1]):
            pair = _yes_and_no(scene, rng, rng.choice(MME_FORMS[category][0]))
            if pair is None:
                continue
            question_id = f"{category}/{MME_FORMS[category][1] - left[category]:04d}.png"
            left[category] -= 1
            pairs.append([(as_open(fact).prompt, _mme_row(question_id, scene, fact, category)) for fact in pair])
            break
        if not any(left.values()):
            break
    # The metric takes rows in pairs: these are what is shuffled.
    rows = [row for pair in SeededRandom("order", split).shuffled(pairs) for row in pair]
    return [table("default", "test", columns("question_id image:image question answer category"), rows)]


def _yes_and_no(scene: Scene, rng: SeededRandom, form: str) -> list[Fact] | None:
    """A question of the form with the answer yes and one with no, in random order, or None when 40 tries give none."""
    found: dict[str, Fact] = {}
    for _ in range(40):
        fact = FORMS[form](scene, rng)
        if fact is not None and fact.answer in ("yes", "no"):
            found.setdefault(fact.answer, fact)
        if len(found) == 2:
            return rng.shuffled(tuple(found.values()))
    return None


def _mme_row(question_id: str, scene: Scene, fact: Fact, category: str) -> Row:
    return {
        "question_id": question_id,
        "image": image_of(scene),
        "question": f"{fact.question} Please answer yes or no.",
        "answer": fact.answer.capitalize(),
        "category": category,
    }
