"""GQA and OK-VQA."""

from __future__ import annotations

from PIL import Image

from llava.mini.benchmarks.table import Table, balanced_facts, columns, image_of, table
from llava.mini.questions import as_open

# GQA form -> number of questions, and the structural and semantic type that GQA would file it under.
GQA_FORMS = {
    "exists": (32, "verify", "obj"),
    "both": (16, "logical", "obj"),
    "color": (32, "query", "attr"),
    "is_color": (24, "verify", "attr"),
    "shape": (24, "query", "cat"),
    "size": (12, "query", "attr"),
    "relation": (40, "verify", "rel"),
    "related": (16, "query", "rel"),
    "side": (16, "choose", "global"),
    "background": (12, "query", "global"),
    "same_color": (16, "compare", "attr"),
}


def gqa() -> list[Table]:
    """GQA: questions in one table and the images they ask about in another, three questions per image."""
    images: dict[str, Image.Image] = {}
    rows = []
    for i, (scene, fact, _) in enumerate(balanced_facts("gqa", GQA_FORMS, per_scene=3)):
        image_id = f"n{scene.seed:06d}"
        images.setdefault(image_id, image_of(scene))
        _, structural, semantic = GQA_FORMS[fact.form]
        row = {
            "id": f"{i:08d}",
            "imageId": image_id,
            "question": fact.question,
            "isBalanced": True,
            "groups": {"global": fact.form, "local": f"{i:08d}"},
            "entailed": "[]",
            "equivalent": f"['{i:08d}']",
            "types": {"structural": structural, "semantic": semantic, "detailed": fact.form},
            "answer": fact.answer,
            "fullAnswer": f"The answer is {fact.answer}.",
            "semantic": [{"operation": structural, "argument": fact.form, "dependencies": []}],
            "annotations": {"question": [], "answer": [], "fullAnswer": []},
            "semanticStr": f"{structural}: {fact.form}",
        }
        rows.append((as_open(fact).prompt, row))
    types = {
        **columns("id imageId question isBalanced:bool entailed equivalent answer fullAnswer semanticStr"),
        "groups": columns("global local"),
        "types": columns("structural semantic detailed"),
        "semantic": [columns("operation argument dependencies:[int32]")],
        "annotations": {name: [columns("objectId value")] for name in ("question", "answer", "fullAnswer")},
    }
    image_rows = [{"id": image_id, "image": image} for image_id, image in images.items()]
    return [
        table("testdev_balanced_instructions", "testdev", types, rows, "gqa"),
        Table("testdev_balanced_images", "testdev", columns("id image:image"), image_rows, []),
    ]


OK_VQA_FORMS = {"fruit": 64, "category": 56, "corners": 48, "sound": 40}


def ok_vqa_val2014() -> list[Table]:
    """OK-VQA: what is seen has to be joined with something known; ten answers, eight of them the plain right one."""
    rows = []
    for i, (scene, fact, rng) in enumerate(balanced_facts("ok_vqa_val2014", OK_VQA_FORMS)):
        row = {
            "question_id": str(1000 + i),
            "image": image_of(scene),
            "question": fact.question,
            "answers": rng.shuffled([fact.answer] * 8 + ["not sure", "unclear"]),
            "question_type": fact.form,
            "answer_type": "other",
        }
        rows.append((as_open(fact, "okvqa").prompt, row))
    types = columns("question_id image:image question answers:[string] question_type answer_type")
    return [table("default", "val2014", types, rows, "ok_vqa_val2014")]
