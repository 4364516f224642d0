"""GQA stores questions and images separately; here an image is opened when its question needs it.

The builtin definition decodes one image per question (12,578 of them, of 398 images) before the first prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from datasets import Dataset, load_dataset
from PIL import Image


def look_up_in(images: Dataset) -> Callable[[dict[str, Any]], list[Image.Image]]:
    """A ``doc_to_visual`` that finds a question's image among the rows (id, image) of ``images``."""
    rows = {identity: row for row, identity in enumerate(images["id"])}

    def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
        return [images[rows[doc["imageId"]]]["image"].convert("RGB")]

    return doc_to_visual


@cache
def _published() -> Callable[[dict[str, Any]], list[Image.Image]]:
    return look_up_in(load_dataset("lmms-lab-encoder/GQA", "testdev_balanced_images", split="testdev"))


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The image of a question of the published data set."""
    return _published()(doc)
