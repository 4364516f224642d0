"""GQA and OK-VQA."""

from __future__ import annotations

from PIL import Image

from llava.mini.benchmarks.table import Table, balanced_facts, picture, shuffled, table
from llava.mini.questions import as_open

__all__ = ["gqa", "ok_vqa_val2014"]

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
    """GQA: questions in one table and the images they ask about in another, three questions an image."""
    split = "gqa"
    columns = {
        "id": "string",
        "imageId": "string",
        "question": "string",
        "isBalanced": "bool",
        "groups": {"global": "string", "local": "string"},
        "entailed": "string",
        "equivalent": "string",
        "types": {"structural": "string", "semantic": "string", "detailed": "string"},
        "answer": "string",
        "fullAnswer": "string",
        "semantic": [{"operation": "string", "argument": "string", "dependencies": ["int32"]}],
        "annotations": {
            "question": [{"objectId": "string", "value": "string"}],
            "answer": [{"objectId": "string", "value": "string"}],
            "fullAnswer": [{"objectId": "string", "value": "string"}],
        },
        "semanticStr": "string",
    }
    images: dict[str, Image.Image] = {}
    rows = []
    wanted = {form: n for form, (n, _, _) in GQA_FORMS.items()}
    for i, (scene, fact, _) in enumerate(balanced_facts(split, wanted, per_scene=3)):
        image_id = f"n{scene.seed:06d}"
        images.setdefault(image_id, picture(scene))
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
    image_rows = [{"id": image_id, "image": image} for image_id, image in images.items()]
    return [
        table("testdev_balanced_instructions", "testdev", columns, shuffled(rows, split)),
        Table("testdev_balanced_images", "testdev", {"id": "string", "image": "image"}, image_rows, []),
    ]


OK_VQA_FORMS = {"fruit": 64, "category": 56, "corners": 48, "sound": 40}


def ok_vqa_val2014() -> list[Table]:
    """OK-VQA: what is seen has to be joined with something known; ten answers, eight of them the plain right one."""
    split = "ok_vqa_val2014"
    columns = {
        "question_id": "string",
        "image": "image",
        "question": "string",
        "answers": ["string"],
        "question_type": "string",
        "answer_type": "string",
    }
    rows = []
    for i, (scene, fact, rng) in enumerate(balanced_facts(split, OK_VQA_FORMS)):
        row = {
            "question_id": str(1000 + i),
            "image": picture(scene),
            "question": fact.question,
            "answers": rng.shuffled([fact.answer] * 8 + ["not sure", "unclear"]),
            "question_type": fact.form,
            "answer_type": "other",
        }
        rows.append((as_open(fact, "okvqa").prompt, row))
    return [table("default", "val2014", columns, shuffled(rows, split))]
