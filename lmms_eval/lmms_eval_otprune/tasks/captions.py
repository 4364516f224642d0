"""Captions on one line each, as the builtin scoring expects.

It removes only one kind of line break. Any other one, in an answer or a reference, would split a caption in two, and
all captions after it would be scored against another image's references.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llava.eval.results.cider import one_line


def coco(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The builtin record of a caption of COCO, its texts on one line each."""
    from lmms_eval.tasks.coco_cap.utils import coco_process_result

    return _record(coco_process_result, doc, "answer", results)


def flickr(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The same for Flickr30k."""
    from lmms_eval.tasks.flickr30k.utils import flickr_process_result

    return _record(flickr_process_result, doc, "caption", results)


def nocaps(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The same for NoCaps."""
    from lmms_eval.tasks.nocaps.utils import nocaps_process_result

    return _record(nocaps_process_result, doc, "annotations_captions", results)


def _record(builtin: Callable, doc: dict[str, Any], references: str, results: list[str]) -> dict[str, Any]:
    return builtin(
        {**doc, references: [one_line(text) for text in doc[references]]}, [one_line(text) for text in results]
    )
