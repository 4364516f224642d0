"""A small page that steps through a selection: kept tokens appear on the image in the order of their list."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava.eval.page import data_uri, render

if TYPE_CHECKING:
    from llava.eval.views import View

WIDEST = 672
"""Pixels that a view is shrunk to."""


@dataclass(frozen=True)
class Answer:
    """What a model answered, as a person reads it, and whether it is right."""

    text: str
    right: bool


def selection_html(
    views: Sequence[View],
    kept: Mapping[str, Sequence[int] | None],
    name: str,
    answers: Mapping[str, Answer] | None = None,
    whole: bool = False,
) -> str:
    """The images and the controls as a fragment of HTML; the page needs token_page.css and, at its end, token_page.js.

    ``kept`` are token indices by method, in the order in which they appear, or None for all; ``name`` labels the
    controls; ``answers`` are those of the methods. With ``whole`` it is a page of its own.
    """
    place = {
        int(index): (number, int(y), int(x))
        for number, view in enumerate(views)
        for (y, x), index in np.ndenumerate(view.patches)
    }
    # A newline token has no place on the image.
    methods = [
        {"name": method, "places": None if indices is None else [place.get(int(index)) for index in indices]}
        for method, indices in kept.items()
    ]
    counts = {
        method: [view.patches.size if indices is None else int(np.isin(view.patches, indices).sum()) for view in views]
        for method, indices in kept.items()
    }
    data = {"views": [_described(view) for view in views], "methods": methods}
    values = {"data": data, "counts": counts, "name": name, "answers": answers or {}, "whole": whole}
    return render("token_page.html.jinja", **values)


def token_page(views: Sequence[View], kept: Mapping[str, Sequence[int]], name: str) -> str:
    """The same as a page of its own, which needs nothing from elsewhere."""
    return selection_html(views, kept, name, whole=True)


def _described(view: View) -> dict[str, Any]:
    rows, columns = view.patches.shape
    # Whole pixels per patch: otherwise neighbours bleed into each other.
    scale = max(4, WIDEST // max(rows, columns))
    image = view.image.resize((columns * scale, rows * scale), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    described = {"name": view.name, "rows": rows, "columns": columns}
    return described | {"image": data_uri(buffer.getvalue(), "image/jpeg")}
