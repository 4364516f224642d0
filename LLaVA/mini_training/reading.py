"""Reading: which text stands at each patch of a page, and what it belongs to; then questions about pages.

A page is known exactly, so a tower can be asked patch by patch what stands there: the whole text of up to six
characters, the character of this patch, colour and size of the print, the row and the column that a number belongs
to, and whether it is the first, last, least or greatest of its kind. The heads are thrown away afterwards, as those
of `mini_training.tower` are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, PreTrainedTokenizerBase

from llava.mini.font import GLYPH_HEIGHT, GLYPH_WIDTH, text_width
from llava.mini.pages import (
    INKS,
    PAGES,
    PAPERS,
    SEASONS,
    SMALL,
    Box,
    Chart,
    Grid,
    Page,
    Poster,
    Text,
    money,
    render_page,
)
from llava.mini.questions import QA, sample_page_questions
from llava.mini.scenes import CHARACTERS, COLORS, GRID, IMAGE_SIZE, PATCH_SIZE, WORDS
from llava.mini.seeded_random import SeededRandom
from mini_training.packing import Drawn, Packed, pack
from mini_training.tower import MIN_PATCH_PIXELS, hidden_state, pixel_values

TEXT_LENGTH = 6
CROWDED = "crowded"
"""A page for the tower alone, printed full."""

_CHARACTERS = {character: i for i, character in enumerate(("", *CHARACTERS, "."))}
_ROWS = {name: i for i, name in enumerate(("", *WORDS))}
_COLUMNS = {name: i for i, name in enumerate(("", *SEASONS, "shop", "no", "total"))}
WORDS_ON_PAGE = (*WORDS, *SEASONS)
_INKS = {COLORS[name]: i for i, name in enumerate(INKS)}

# Head -> classes. All but "kind" are asked only where a text or a bar is.
HEADS = {
    "kind": 3,
    "here": len(_CHARACTERS),
    **{f"text_{i}": len(_CHARACTERS) for i in range(TEXT_LENGTH)},
    "color": len(INKS),
    "scale": 9,
    "row": len(_ROWS),
    "column": len(_COLUMNS),
    "order": 3,
    "rank": 3,
}
_TEXTS = tuple(name for name in HEADS if name.startswith("text_"))


@dataclass(frozen=True)
class Reading:
    """Which pages a stage shows, and how many questions it asks.

    Attributes
    ----------
    phases : list of dict
        Each with ``until``, the share of the stage at which the phase ends, and ``pages``, kind of page -> weight.
    questions : int
        So many are drawn about a page; each that comes is asked once.

    Raises
    ------
    ValueError
        For an unknown kind of page, or phases that do not end with the stage.
    """

    phases: list[dict]
    questions: int = 24

    def __post_init__(self):
        for phase in self.phases:
            for kind in phase["pages"]:
                if kind not in (*PAGES, CROWDED):
                    raise ValueError(f"page must be one of {', '.join(PAGES)} or {CROWDED}; got {kind!r}")
        ends = [phase["until"] for phase in self.phases]
        if ends != sorted(ends) or not ends or ends[-1] != 1:
            raise ValueError(f"until of the phases must rise to 1, got {ends}")

    def kind(self, rng: SeededRandom, share: float) -> str:
        """A kind of page for an example that stands at this share of the stage."""
        return rng.weighted(next(phase["pages"] for phase in self.phases if share < phase["until"]))


def draw_page(kind: str, rng: SeededRandom) -> Page:
    """A page of `PAGES`, or a crowded one."""
    return crowded_page(rng) if kind == CROWDED else PAGES[kind](rng)


def crowded_page(rng: SeededRandom) -> Page:
    """Lines of words, numbers, prices and codes from edge to edge, as much to learn from as a page can hold."""
    marks, y = [], rng.between(2, 20)
    while True:
        scale = rng.weighted({2: 5, 3: 4, 4: 2, 5: 1, 6: 1})
        if scale == SMALL:
            y = -(-y // PATCH_SIZE) * PATCH_SIZE
        if y + GLYPH_HEIGHT * scale > IMAGE_SIZE:
            return Page(Poster(()), rng.choice(PAPERS), tuple(marks))
        x = rng.between(2, 40)
        while x + text_width(text := _any_text(rng), scale) <= IMAGE_SIZE:
            own = text if text in _ROWS else ""
            marks.append(Text(x, y, text, scale, COLORS[rng.choice(INKS)], (own, "")))
            x += text_width(text, scale) + rng.between(2, 5) * 6 * scale
        y += GLYPH_HEIGHT * scale + rng.between(4, 16)


def _any_text(rng: SeededRandom) -> str:
    kind = rng.weighted({"word": 3, "number": 4, "price": 3, "code": 3})
    if kind == "word":
        return rng.choice(WORDS)
    if kind == "price":
        return money(rng.between(50, 4999))
    alphabet = CHARACTERS if kind == "code" else CHARACTERS[26:]
    return "".join(rng.choice(alphabet) for _ in range(rng.between(1, TEXT_LENGTH)))


def page_targets(page: Page) -> dict[str, np.ndarray]:
    """What the heads should say about a page.

    For each of ``HEADS`` int64 (576,), -1 where it is not asked; ``words`` float32 (28,), which words stand there.
    """
    targets = {name: np.full((GRID, GRID), -1, np.int64) for name in HEADS}
    targets["kind"][:] = 0
    for mark, (order, rank) in zip(page.marks, _standing(page), strict=True):
        if not (text := getattr(mark, "text", "")):
            continue
        own = _patches(mark)
        row, column = mark.of
        known = {
            "kind": 1 if isinstance(mark, Text) else 2,
            "color": _INKS.get(mark.rgb, INKS.index("black")),
            "row": _ROWS.get(row, 0),
            "column": _COLUMNS[column],
            "order": order,
            "rank": rank,
        }
        known |= dict(zip(_TEXTS, _letters(text), strict=True))
        if isinstance(mark, Text):
            pitch = (GLYPH_WIDTH + 1) * mark.scale
            cover = np.stack([_overlap(mark.x + i * pitch, GLYPH_WIDTH * mark.scale) for i in range(len(text))])
            here = np.array([_CHARACTERS.get(character, 0) for character in text])[cover.argmax(0)]
            targets["here"][own] = np.broadcast_to(here, own.shape)[own]
            known["scale"] = mark.scale
        for name, value in known.items():
            targets[name][own] = value
    flat = {name: values.reshape(-1) for name, values in targets.items()}
    printed = {word for mark in page.marks if isinstance(mark, Text) for word in mark.text.split()}
    return flat | {"words": np.array([word in printed for word in WORDS_ON_PAGE], np.float32)}


def _letters(text: str) -> list[int]:
    return [_CHARACTERS.get(character, 0) for character in text[:TEXT_LENGTH].ljust(TEXT_LENGTH, "\0")]


def _size(mark: Text | Box) -> tuple[int, int]:
    if isinstance(mark, Box):
        return mark.width, mark.height
    return text_width(mark.text, mark.scale), GLYPH_HEIGHT * mark.scale


def _patches(mark: Text | Box) -> np.ndarray:
    """The patches that a mark covers a good part of: bool (24, 24)."""
    width, height = _size(mark)
    return _overlap(mark.y, height)[:, None] * _overlap(mark.x, width)[None, :] >= MIN_PATCH_PIXELS


def answer_patches(page: Page, qa: QA) -> np.ndarray:
    """The patches where the answer to a question is seen: bool (576,), none where it is nowhere in particular."""
    shown = np.zeros((GRID, GRID), bool)
    for mark in _answer_marks(page, qa):
        shown |= _patches(mark)
    return shown.reshape(-1)


def _answer_marks(page: Page, qa: QA) -> list[Text | Box]:
    words = set(re.findall(r"\w+", qa.question))
    marks = [mark for mark in page.marks if getattr(mark, "text", "")]
    if qa.form == "difference":
        return [mark for mark in marks if mark.of[0] in words and mark.text.isdecimal()]
    if qa.form == "highest_bar":
        return [mark for mark in marks if mark.of[0] == qa.answer]
    if qa.form in ("row_of_cell", "largest_in_column"):
        return [mark for mark in marks if mark.of[0] == qa.answer and mark.of[1] in words]
    exact = [mark for mark in marks if mark.text in (qa.answer, f"{qa.answer} shop") and qa.form != "bars"]
    return [mark for mark in exact if mark.of[0] in words] or exact


def _overlap(start: int, length: int) -> np.ndarray:
    """How many of each patch's 14 pixels along a side lie in ``start .. start + length``: (24,)."""
    edges = np.arange(GRID) * PATCH_SIZE
    return np.clip(np.minimum(edges + PATCH_SIZE, start + length) - np.maximum(edges, start), 0, None)


def _standing(page: Page) -> list[tuple[int, int]]:
    """For each mark whether it is first (1) or last (2), and whether it is least (1) or greatest (2) of its kind."""
    content, texts = page.content, [getattr(mark, "text", "") for mark in page.marks]
    if isinstance(content, Poster) and len(content.lines) > 1:
        orders, sizes = range(len(content.lines)), [line.scale for line in content.lines]
        return [(_end(i, orders), _end(size, sizes)) for i, size in zip(orders, sizes, strict=True)]
    if isinstance(content, Chart):
        values = content.values
        ranks = [_end(values[mark.of[0]], values.values()) if mark.of[0] else 0 for mark in page.marks]
        return [(0, rank) for rank in ranks]
    if isinstance(content, Grid):
        columns = dict(zip(content.header, zip(*content.rows.values(), strict=True), strict=True))
        cells = [bool(text) and mark.of[1] in columns for mark, text in zip(page.marks, texts, strict=True)]
        return [
            (0, _end(int(text), columns[mark.of[1]]) if cell and mark.of[0] else 0)
            for mark, text, cell in zip(page.marks, texts, cells, strict=True)
        ]
    return [(0, 0)] * len(page.marks)


def _end(value: int, values: Iterable[int]) -> int:
    return 1 if value == min(values) else 2 if value == max(values) else 0


@dataclass(frozen=True)
class PageImages(Drawn):
    """Pages and targets."""

    reading: Reading

    def __getitem__(self, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rng = SeededRandom("page", self.split, self.first_seed + number)
        page = draw_page(self.reading.kind(rng, number / self.length), rng)
        return np.array(render_page(page)), page_targets(page)


class ReadTowerTask(nn.Module):
    """The trained tower in a folder, with heads for reading: images and targets in, losses out."""

    def __init__(self, folder: Path):
        super().__init__()
        self.tower = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
        width = self.tower.config.hidden_size
        self.words = nn.Linear(width, len(WORDS_ON_PAGE))
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in HEADS.items()})

    def forward(self, levels: torch.Tensor, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses by name, and accuracies (no gradient) under ``accuracy/<name>``.

        Of uint8 images (B, 336, 336, 3), and their stacked `page_targets`.
        """
        hidden = hidden_state(self.tower, pixel_values(levels))
        summary, patches = hidden[:, 0], hidden[:, 1:]
        seen = targets["kind"] > 0  # (B, 576)
        asked = patches[seen]  # (S, width)
        out: dict[str, torch.Tensor] = {}
        kinds = self.heads["kind"](patches).float()
        out["kind"] = F.cross_entropy(kinds.flatten(0, 1), targets["kind"].flatten())
        out["words"] = 5 * F.binary_cross_entropy_with_logits(self.words(summary).float(), targets["words"])
        right = []
        for name in (name for name in HEADS if name != "kind"):
            scores, target = self.heads[name](asked).float(), targets[name][seen]
            out[name] = F.cross_entropy(scores, target, ignore_index=-1)
            hit = scores.argmax(-1) == target
            out[f"accuracy/{name}"] = hit[target >= 0].float().mean().detach()
            if name in _TEXTS:
                right.append(hit)
        # A whole text.
        out["accuracy/text"] = torch.stack(right).all(0).float().mean().detach()
        return out


@dataclass(frozen=True)
class PackedPages(Drawn):
    """Pages with questions, packed."""

    reading: Reading
    tokenizer: PreTrainedTokenizerBase

    def __getitem__(self, number: int) -> Packed:
        rng = SeededRandom("page", self.split, self.first_seed + number)
        kind = self.reading.kind(rng, number / self.length)
        page = draw_page(kind, rng)
        asked = sample_page_questions(kind, page, rng, self.reading.questions)
        packed = pack(asked, [page], self.tokenizer)
        return replace(packed, patches=[answer_patches(page, qa) for qa in asked])
