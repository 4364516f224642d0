"""Pages to read: a poster, a table, a bar chart, a receipt, exactly known and drawn from a seed.

Where scenes (`llava.mini.scenes`) show things, pages show text: words and numbers of several sizes, down to letters
that are as high as one patch. What a page says (its content) is drawn first and then laid out as text and boxes;
`render_page` makes the image, in integers as everywhere in this world: the same pixels on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np
from PIL import Image

from llava.mini.font import GLYPH_HEIGHT, GLYPH_WIDTH, dots, text_width
from llava.mini.scenes import CATEGORIES, COLORS, IMAGE_SIZE, NUMBERS, PATCH_SIZE, WORDS
from llava.mini.seeded_random import SeededRandom

Color = tuple[int, int, int]

PAPERS: tuple[Color, ...] = ((250, 248, 240), (236, 240, 246), (244, 236, 224), (228, 234, 228))
INK: Color = (24, 24, 28)
RULE: Color = (150, 150, 155)
INKS = ("red", "orange", "green", "blue", "purple", "black")
"""Names of the colours that stand out from every paper."""

SEASONS = ("spring", "summer", "autumn", "winter")
LABELS = tuple(word for word in WORDS if len(word) <= 4)
SMALL, RIM = 2, 14
"""Pixels per dot of the smallest letters, which are one patch high; pixels left free at a page's sides."""


@dataclass(frozen=True)
class Text:
    """A line of print: its left and top in pixels, what it says (in capitals), pixels per dot, and its colour.

    `of` names what it belongs to: itself, for a name; for a number its row (thing bought, bar) and its column.
    """

    x: int
    y: int
    text: str
    scale: int
    rgb: Color = INK
    of: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Box:
    """A filled rectangle: a rule, or a bar, which says its value."""

    x: int
    y: int
    width: int
    height: int
    rgb: Color = RULE
    text: str = ""
    of: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Line:
    """A line of a poster: what it says, the name of its colour, and pixels per dot."""

    text: str
    color: str
    scale: int


@dataclass(frozen=True)
class Poster:
    """Lines from the top to the bottom, no two of one size or colour; one of them is a number."""

    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Grid:
    """A table: column names, and for each row's name its numbers."""

    header: tuple[str, ...]
    rows: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Chart:
    """A bar chart: each bar's name and value, which is printed above it or has to be read from the axis."""

    values: dict[str, int]
    printed: bool


@dataclass(frozen=True)
class Receipt:
    """A shop's name, the receipt's number, and what was bought at what price, in hundredths."""

    shop: str
    number: str
    prices: dict[str, int]


@dataclass(frozen=True)
class Page:
    """A page's content and how it is laid out, later marks over earlier ones."""

    content: Poster | Grid | Chart | Receipt
    paper: Color
    marks: tuple[Text | Box, ...]


def money(hundredths: int) -> str:
    """A price as it is printed: 350 -> "3.50"."""
    return f"{hundredths // 100}.{hundredths % 100:02d}"


def _number(rng: SeededRandom, digits: int) -> str:
    return "".join(rng.choice(NUMBERS[1:] if i == 0 else NUMBERS) for i in range(digits))


def _code(rng: SeededRandom) -> str:
    """Letters and digits in turn: what no vocabulary helps with."""
    pair = rng.shuffled((ascii_lowercase, NUMBERS))
    return "".join(rng.choice(pair[i % 2]) for i in range(rng.between(4, 6)))


def _on_grid(y: int) -> int:
    """The nearest line of a grid of patches above: small print stands on it, one patch high."""
    return y // PATCH_SIZE * PATCH_SIZE


def plate(rng: SeededRandom, text: str) -> Page:
    """A page with a single text, of any size that fits."""
    widest = (IMAGE_SIZE - 2 * RIM) // text_width(text, 1)
    line = Line(text, rng.choice(INKS), rng.between(SMALL, min(8, widest)))
    return _posted(rng, (line,))


def poster(rng: SeededRandom) -> Page:
    """Two to four words and a number, one below the other."""
    texts = rng.shuffled([*rng.sample(WORDS, rng.between(2, 4)), _number(rng, rng.between(2, 4))])
    scales, colors = rng.sample(range(SMALL, SMALL + 5), len(texts)), rng.sample(INKS, len(texts))
    return _posted(rng, tuple(map(Line, texts, colors, scales)))


def _posted(rng: SeededRandom, lines: tuple[Line, ...]) -> Page:
    free = IMAGE_SIZE - 2 * RIM - GLYPH_HEIGHT * sum(line.scale for line in lines)
    y, marks = RIM, []
    for line in lines:
        y += rng.between(8, free // len(lines))
        x = rng.between(RIM, IMAGE_SIZE - RIM - text_width(line.text, line.scale))
        top = _on_grid(y) if line.scale == SMALL else y
        marks.append(Text(x, top, line.text, line.scale, COLORS[line.color], (line.text, "")))
        y += GLYPH_HEIGHT * line.scale
    return Page(Poster(lines), rng.choice(PAPERS), tuple(marks))


def grid(rng: SeededRandom) -> Page:
    """A table of three to five rows and two or three columns of numbers below 100, all different."""
    header = tuple(sorted(rng.sample(SEASONS, rng.between(2, 3)), key=SEASONS.index))
    names = rng.sample(WORDS, rng.between(3, 5))
    numbers = rng.sample(range(1, 100), len(names) * len(header))
    rows = {name: tuple(numbers[i :: len(names)]) for i, name in enumerate(names)}
    scale, height = rng.between(SMALL, 3), rng.choice((28, 42))
    top, first, width = _on_grid(rng.between(RIM, 60)), 106, 76 if len(header) == 3 else 104
    marks: list[Text | Box] = []
    for i, (name, cells) in enumerate((("", header), *rows.items())):
        y, size = top + i * height, scale if i else SMALL
        marks += [Text(RIM, y, name, size, of=(name, ""))] if name else []
        marks.append(Box(RIM, y + height - 4, IMAGE_SIZE - 2 * RIM, 1 if i else 2))
        marks += [
            Text(first + j * width, y, str(cell), size, of=(name, column))
            for j, (cell, column) in enumerate(zip(cells, header, strict=True))
        ]
    return Page(Grid(header, rows), rng.choice(PAPERS), tuple(marks))


def chart(rng: SeededRandom) -> Page:
    """Three to five bars with an axis to 100; where no values are printed, they are tens."""
    names, printed = rng.sample(LABELS, rng.between(3, 5)), rng.chance(50)
    values = rng.sample(range(5, 100) if printed else range(10, 101, 10), len(names))
    left, bottom, per_unit = 56, 280, 2
    marks: list[Text | Box] = []
    for level in range(0, 101, 20):
        y = bottom - level * per_unit
        marks += [Box(left, y, IMAGE_SIZE - RIM - left, 1), Text(RIM, y - 6, str(level), SMALL)]
    slot, colors = (IMAGE_SIZE - RIM - left) // len(names), rng.sample(INKS, len(names))
    for i, (name, value, color) in enumerate(zip(names, values, colors, strict=True)):
        x, top, of = left + i * slot, bottom - value * per_unit, (name, "")
        marks.append(Box(x + slot // 4, top, slot // 2, value * per_unit, COLORS[color], str(value), of))
        marks.append(Text(x + (slot - text_width(name, SMALL)) // 2, bottom + PATCH_SIZE, name, SMALL, of=of))
        if printed:
            above = _on_grid(top - 2 - PATCH_SIZE)
            marks.append(Text(x + (slot - text_width(str(value), SMALL)) // 2, above, str(value), SMALL, of=of))
    return Page(Chart(dict(zip(names, values, strict=True)), printed), rng.choice(PAPERS), tuple(marks))


def receipt(rng: SeededRandom) -> Page:
    """A shop's receipt with three to five things to eat and their sum."""
    content = Receipt(
        shop=rng.choice(CATEGORIES["animal"]),
        number=_number(rng, 3),
        prices={name: 5 * rng.between(10, 199) for name in rng.sample(CATEGORIES["food"], rng.between(3, 5))},
    )
    left, right, scale = rng.between(RIM, 60), IMAGE_SIZE - rng.between(RIM, 60), rng.between(SMALL, 3)
    y = _on_grid(rng.between(RIM, 40))
    marks: list[Text | Box] = [
        Text(left, y, f"{content.shop} shop", 4, of=(content.shop, "shop")),
        Text(left, y + 42, "no", SMALL),
        Text(left + 36, y + 42, content.number, SMALL, of=("", "no")),
    ]
    y += 70
    for name, price in content.prices.items():
        marks += [Text(left, y, name, scale, of=(name, "")), _right(right, y, money(price), scale, (name, ""))]
        y += 28
    marks += [Box(left, y, right - left, 2), Text(left, y + 14, "total", 3, of=("", "total"))]
    marks.append(_right(right, y + 14, money(sum(content.prices.values())), 3, ("", "total")))
    return Page(content, rng.choice(PAPERS), tuple(marks))


def _right(x: int, y: int, text: str, scale: int, of: tuple[str, str]) -> Text:
    """A text that ends at x."""
    return Text(x - text_width(text, scale), y, text, scale, of=of)


PAGES: dict[str, Callable[[SeededRandom], Page]] = {
    "word": lambda rng: plate(rng, rng.choice(WORDS)),
    "digits": lambda rng: plate(rng, _number(rng, rng.between(3, 6))),
    "code": lambda rng: plate(rng, _code(rng)),
    "poster": poster,
    "grid": grid,
    "chart": chart,
    "receipt": receipt,
}
"""Kind of page -> function that draws one."""


def render_page(page: Page) -> Image.Image:
    """The page's image, 336 x 336 RGB."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    canvas[:] = page.paper
    for mark in page.marks:
        if isinstance(mark, Box):
            canvas[mark.y : mark.y + mark.height, mark.x : mark.x + mark.width] = mark.rgb
            continue
        for i, character in enumerate(mark.text):
            x = mark.x + i * (GLYPH_WIDTH + 1) * mark.scale
            ink = dots(character, mark.scale) > 0
            canvas[mark.y : mark.y + ink.shape[0], x : x + ink.shape[1]][ink] = mark.rgb
    return Image.fromarray(canvas)
