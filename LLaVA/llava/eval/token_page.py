"""A small page that steps through a selection: each kept token appears on the image in the order of its list."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from llava.eval.views import View

WIDEST = 672
"""Pixels that a view's picture is shrunk to."""


def style() -> str:
    """CSS that a page with `selection_html` needs in its head."""
    return files("llava.eval").joinpath("token_page.css").read_text(encoding="utf-8")


def script() -> str:
    """JavaScript that it needs at its end."""
    return files("llava.eval").joinpath("token_page.js").read_text(encoding="utf-8")


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
) -> str:
    """The images and the controls as a fragment of HTML; the page needs `style` and, at its end, `script`.

    Parameters
    ----------
    views : sequence of View
    kept : dict of method -> token indices, in the order in which they appear; None for all of them
    name : str
        What the controls are said to step through.
    answers : dict of method -> Answer, optional
    """
    place = {
        int(index): (number, int(y), int(x))
        for number, view in enumerate(views)
        for (y, x), index in np.ndenumerate(view.patches)
    }
    data = {
        "views": [_described(view) for view in views],
        # A newline token has no place on the image.
        "methods": [
            {"name": method, "places": None if indices is None else [place.get(int(index)) for index in indices]}
            for method, indices in kept.items()
        ],
    }
    figures = "".join(
        f"<figure><canvas></canvas><figcaption>{_caption(method, view, indices, (answers or {}).get(method))}"
        "</figcaption></figure>\n"
        for method, indices in kept.items()
        for view in views
    )
    content = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return (
        f'<div class="selection">\n<div class="maps">\n{figures}</div>\n'
        f'<div class="steps"><button type="button" aria-label="one token back">&#8722;</button>'
        f'<button type="button" aria-label="play or stop">&#9654;</button>'
        f'<button type="button" aria-label="one token on">+</button>'
        f'<input type="range" min="0" max="1" step="1" aria-label="tokens of {html.escape(name)}">'
        "<output></output></div>\n"
        f'<script type="application/json">{content}</script>\n</div>\n'
    )


def _caption(method: str, view: View, indices: Sequence[int] | None, said: Answer | None) -> str:
    tokens = view.patches.size
    here = tokens if indices is None else int(np.isin(view.patches, indices).sum())
    text = f'<b>{html.escape(method)}</b><br><span class="soft"><span class="count">{here}</span> of {tokens} tokens'
    text += "</span>" if view.name == "image" else f", {html.escape(view.name)}</span>"
    if said is not None:
        mark, meaning = ("\N{CHECK MARK}", "right") if said.right else ("\N{BALLOT X}", "wrong")
        text += f'<br><span class="{meaning}" title="{meaning}">{mark} {html.escape(said.text) or "(nothing)"}</span>'
    return text


def token_page(views: Sequence[View], kept: Mapping[str, Sequence[int]], name: str) -> str:
    """The same as a page of its own, which needs nothing from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Kept visual tokens: {html.escape(name)}</title>\n"
        "<style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:70rem;"
        f"padding:0 1rem}}{style()}</style>\n</head>\n<body>\n<h1>Kept visual tokens: {html.escape(name)}</h1>\n"
        f"{selection_html(views, kept, name)}<script>{script()}</script>\n</body>\n</html>\n"
    )


def data_uri(content: bytes, kind: str) -> str:
    """A file as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _described(view: View) -> dict[str, Any]:
    rows, columns = view.patches.shape
    # Whole pixels a patch: otherwise neighbours bleed into each other.
    scale = max(4, WIDEST // max(rows, columns))
    picture = view.picture.resize((columns * scale, rows * scale), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return {
        "name": view.name,
        "rows": rows,
        "columns": columns,
        "picture": data_uri(buffer.getvalue(), "image/jpeg"),
    }
