"""A small page that steps through a selection: each kept token appears on the picture in the order of its list."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from llava.eval.views import View

WIDEST = 672
"""Pixels that a view's picture is shrunk to."""

STYLE = """
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.2rem,1fr));gap:.8rem}
.maps figure{margin:0;max-width:21rem}
.maps canvas{width:100%;height:auto;display:block;border-radius:4px;background:#8883}
.maps figcaption{font-size:.9rem;line-height:1.4;margin:.3rem 0}
.maps b{overflow-wrap:anywhere}
.steps{display:flex;flex-wrap:wrap;align-items:center;gap:.6rem;margin:.6rem 0}
.steps input[type=range]{flex:1 1 12rem;min-width:8rem}
.steps button{font:inherit;min-width:2.6rem;min-height:2.2rem}
"""

SCRIPT = """
for (const box of document.querySelectorAll(".selection")) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const slider = box.querySelector("input"), said = box.querySelector("output");
  const figures = box.querySelectorAll("figure"), panels = [];
  let timer = null;
  for (const [place, method] of data.methods.entries()) for (const [number, view] of data.views.entries()) {
    const figure = figures[place * data.views.length + number], image = new Image();
    const canvas = figure.querySelector("canvas"), count = figure.querySelector(".count");
    image.onload = () => { canvas.width = image.width; canvas.height = image.height; show(); };
    image.src = view.picture;
    panels.push({method, view, number, image, canvas, count});
  }
  const most = Math.max(...data.methods.map(method => method.places ? method.places.length : 0));
  slider.max = most;
  slider.value = most;
  function show() {
    const step = Number(slider.value);
    said.textContent = `${step} of ${most}`;
    for (const {method, view, number, image, canvas, count} of panels) {
      const pen = canvas.getContext("2d"), wide = canvas.width / view.columns, high = canvas.height / view.rows;
      if (!image.complete || !canvas.width) continue;
      pen.drawImage(image, 0, 0);
      if (!method.places) continue;
      pen.fillStyle = "rgba(235,235,235,.78)";
      pen.fillRect(0, 0, canvas.width, canvas.height);
      const kept = method.places.slice(0, step), here = kept.filter(place => place && place[0] === number);
      for (const [, row, column] of here)
        pen.drawImage(image, column * wide, row * high, wide, high, column * wide, row * high, wide, high);
      const last = step < most && kept[kept.length - 1];
      if (last && last[0] === number) {
        pen.strokeStyle = "#D55E00";
        pen.lineWidth = Math.max(2, wide / 8);
        pen.strokeRect(last[2] * wide, last[1] * high, wide, high);
      }
      count.textContent = here.length;
    }
  }
  function move(by) { slider.value = Number(slider.value) + by; show(); }
  function stop() { clearInterval(timer); timer = null; play.textContent = "\\u25B6"; }
  const [back, play, next] = box.querySelectorAll("button");
  slider.addEventListener("input", show);
  back.addEventListener("click", () => move(-1));
  next.addEventListener("click", () => move(1));
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) >= most) slider.value = 0;
    play.textContent = "\\u23F8";
    timer = setInterval(() => { move(1); if (Number(slider.value) >= most) stop(); }, 120);
  });
}
"""


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
    """The images and the controls as a fragment of HTML; the page needs `STYLE` and, at its end, `SCRIPT`.

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
        f"padding:0 1rem}}{STYLE}</style>\n</head>\n<body>\n<h1>Kept visual tokens: {html.escape(name)}</h1>\n"
        f"{selection_html(views, kept, name)}<script>{SCRIPT}</script>\n</body>\n</html>\n"
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
