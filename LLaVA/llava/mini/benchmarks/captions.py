"""COCO-Caption2017, Flickr30k and NoCaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llava.mini.benchmarks.table import Row, Table, columns, image_of, scenes_of, table
from llava.mini.captions import CAPTION_PROMPT, caption_references
from llava.mini.scenes import IMAGE_SIZE, Scene
from llava.mini.seeded_random import SeededRandom

N_IMAGES = 200


def _captioned(
    split: str, n_references: int, fits: Callable[[Scene], bool], row: Callable[[int, list[str]], Row]
) -> Iterator[tuple[str, Row]]:
    """Rows of scenes with at most `n_references` captions each, chosen at random as different people's would be."""
    chosen = filter(fits, scenes_of(split))
    for i, scene in zip(range(N_IMAGES), chosen, strict=False):
        captions = caption_references(scene)
        rng = SeededRandom("references", split, scene.seed)
        references = rng.sample(captions, min(n_references, len(captions)))
        yield CAPTION_PROMPT, {"image": image_of(scene), **row(i, references)}


def coco2017_cap_val() -> list[Table]:
    """COCO-Caption2017: any scenes, five references."""
    question = "Please carefully observe the image and come up with a caption for the image."

    def row(i: int, references: list[str]) -> Row:
        name = f"{i + 1:012d}.jpg"
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        return {"question_id": name, "file_name": name, "id": i + 1, "question": question, "answer": references, **size}

    types = columns(
        "question_id image:image question answer:[string] id:int64 license:int64 file_name coco_url height:int64 "
        "width:int64 date_captured"
    )
    return [table("default", "val", types, _captioned("coco2017_cap_val", 5, lambda scene: True, row))]


def flickr30k_test() -> list[Table]:
    """Flickr30k: scenes with two to five objects, five references."""

    def row(i: int, references: list[str]) -> Row:
        ids = [str(5 * i + j) for j in range(len(references))]
        return {"caption": references, "sentids": ids, "img_id": str(i), "filename": f"{i:010d}.jpg"}

    types = columns("image:image caption:[string] sentids:[string] img_id filename")
    rows = _captioned("flickr30k_test", 5, lambda scene: 2 <= len(scene.objects) <= 5, row)
    return [table("default", "test", types, rows)]


def nocaps_val() -> list[Table]:
    """NoCaps: crowded scenes with a sign, up to ten references."""

    def row(i: int, references: list[str]) -> Row:
        return {
            "image_file_name": f"{i:016x}.jpg",
            "image_height": IMAGE_SIZE,
            "image_width": IMAGE_SIZE,
            "image_id": i,
            "image_open_images_id": f"{i:016x}",
            "annotations_ids": [10 * i + j for j in range(len(references))],
            "annotations_captions": references,
            "image_domain": "out-domain",
        }

    types = columns(
        "image:image image_coco_url image_date_captured image_file_name image_height:int32 image_width:int32 "
        "image_id:int32 image_license:int8 image_open_images_id annotations_ids:[int32] annotations_captions:[string] "
        "image_domain"
    )
    rows = _captioned("nocaps_val", 10, lambda scene: len(scene.objects) >= 4 and len(scene.signs) > 0, row)
    return [table("default", "validation", types, rows)]
