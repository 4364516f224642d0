"""COCO-Caption2017, Flickr30k and NoCaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llava.mini.benchmarks.table import Table, picture, scenes_of, table
from llava.mini.captions import CAPTION_PROMPT, caption_references
from llava.mini.scenes import IMAGE_SIZE, Scene, SeededRandom

__all__ = ["coco2017_cap_val", "flickr30k_test", "nocaps_val"]


def _captioned(
    split: str, n: int, n_references: int, fits: Callable[[Scene], bool]
) -> Iterator[tuple[Scene, list[str]]]:
    """`n` scenes with at most `n_references` captions each, chosen at random as different people's would be."""
    for scene in scenes_of(split):
        if n == 0:
            return
        if fits(scene):
            n -= 1
            references = caption_references(scene)
            yield (
                scene,
                SeededRandom("references", split, scene.seed).sample(references, min(n_references, len(references))),
            )


def coco2017_cap_val() -> list[Table]:
    """COCO-Caption2017: any scenes, five references."""
    split = "coco2017_cap_val"
    columns = {
        "question_id": "string",
        "image": "image",
        "question": "string",
        "answer": ["string"],
        "id": "int64",
        "license": "int64",
        "file_name": "string",
        "coco_url": "string",
        "height": "int64",
        "width": "int64",
        "date_captured": "string",
    }
    rows = []
    for i, (scene, references) in enumerate(_captioned(split, 200, 5, lambda scene: True)):
        name = f"{i + 1:012d}.jpg"
        row = {
            "question_id": name,
            "image": picture(scene),
            "question": "Please carefully observe the image and come up with a caption for the image.",
            "answer": references,
            "id": i + 1,
            "license": 0,
            "file_name": name,
            "coco_url": "",
            "height": IMAGE_SIZE,
            "width": IMAGE_SIZE,
            "date_captured": "",
        }
        rows.append((CAPTION_PROMPT, row))
    return [table("default", "val", columns, rows)]


def flickr30k_test() -> list[Table]:
    """Flickr30k: scenes with two to five objects, five references."""
    split = "flickr30k_test"
    columns = {
        "image": "image",
        "caption": ["string"],
        "sentids": ["string"],
        "img_id": "string",
        "filename": "string",
    }
    rows = []
    for i, (scene, references) in enumerate(_captioned(split, 200, 5, lambda scene: 2 <= len(scene.objects) <= 5)):
        row = {
            "image": picture(scene),
            "caption": references,
            "sentids": [str(5 * i + j) for j in range(len(references))],
            "img_id": str(i),
            "filename": f"{i:010d}.jpg",
        }
        rows.append((CAPTION_PROMPT, row))
    return [table("default", "test", columns, rows)]


def nocaps_val() -> list[Table]:
    """NoCaps: crowded scenes with a sign, up to ten references."""
    split = "nocaps_val"
    columns = {
        "image": "image",
        "image_coco_url": "string",
        "image_date_captured": "string",
        "image_file_name": "string",
        "image_height": "int32",
        "image_width": "int32",
        "image_id": "int32",
        "image_license": "int8",
        "image_open_images_id": "string",
        "annotations_ids": ["int32"],
        "annotations_captions": ["string"],
        "image_domain": "string",
    }
    rows = []
    crowded = _captioned(split, 200, 10, lambda scene: len(scene.objects) >= 4 and len(scene.signs) > 0)
    for i, (scene, references) in enumerate(crowded):
        row = {
            "image": picture(scene),
            "image_coco_url": "",
            "image_date_captured": "",
            "image_file_name": f"{i:016x}.jpg",
            "image_height": IMAGE_SIZE,
            "image_width": IMAGE_SIZE,
            "image_id": i,
            "image_license": 0,
            "image_open_images_id": f"{i:016x}",
            "annotations_ids": [10 * i + j for j in range(len(references))],
            "annotations_captions": references,
            "image_domain": "out-domain",
        }
        rows.append((CAPTION_PROMPT, row))
    return [table("default", "validation", columns, rows)]
