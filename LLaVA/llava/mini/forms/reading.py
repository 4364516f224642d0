"""Forms that reading a page answers: a poster, a table, a bar chart, a receipt."""

from __future__ import annotations

from collections.abc import Callable

from llava.mini.forms.facts import Fact, named, other_than
from llava.mini.pages import Chart, Grid, Poster, Receipt, money
from llava.mini.seeded_random import SeededRandom


def _text(poster: Poster, rng: SeededRandom) -> Fact:
    return Fact("text", "What is written in the image?", poster.lines[0].text)


def _text_in_color(poster: Poster, rng: SeededRandom) -> Fact:
    line = rng.choice(poster.lines)
    return Fact("text_in_color", f"What is written in {line.color}?", line.text)


def _line(poster: Poster, rng: SeededRandom) -> Fact:
    where, line = rng.choice((("top", poster.lines[0]), ("bottom", poster.lines[-1])))
    return Fact("line", f"What is written at the {where}?", line.text)


def _print_size(poster: Poster, rng: SeededRandom) -> Fact:
    by_size = sorted(poster.lines, key=lambda line: line.scale)
    how, line = rng.choice((("smallest", by_size[0]), ("largest", by_size[-1])))
    return Fact("print_size", f"What is written in the {how} letters?", line.text)


def _number(poster: Poster, rng: SeededRandom) -> Fact:
    (number,) = (line.text for line in poster.lines if line.text.isdecimal())
    return Fact("number", "Which number is in the image?", number)


def _cell(grid: Grid, rng: SeededRandom) -> Fact:
    row, column = rng.choice(tuple(grid.rows)), rng.below(len(grid.header))
    answer = str(grid.rows[row][column])
    return Fact("cell", f"What is the number of {row} in {grid.header[column]}?", answer)


def _row_of_cell(grid: Grid, rng: SeededRandom) -> Fact:
    row, column = rng.choice(tuple(grid.rows)), rng.below(len(grid.header))
    number = grid.rows[row][column]
    question = f"Which row of the table has {number} in {grid.header[column]}?"
    return Fact("row_of_cell", question, row, other_than(grid.rows, row))


def _largest_in_column(grid: Grid, rng: SeededRandom) -> Fact:
    column = rng.below(len(grid.header))
    how, chosen = rng.choice((("largest", max), ("smallest", min)))
    row = chosen(grid.rows, key=lambda name: grid.rows[name][column])
    return Fact("largest_in_column", f"Which row has the {how} number in {grid.header[column]}?", row)


def _bar(chart: Chart, rng: SeededRandom) -> Fact:
    name = rng.choice(tuple(chart.values))
    return Fact("bar", f"What is the value of {name}?", str(chart.values[name]))


def _highest_bar(chart: Chart, rng: SeededRandom) -> Fact:
    how, chosen = rng.choice((("highest", max), ("lowest", min)))
    return Fact("highest_bar", f"Which bar is the {how}?", chosen(chart.values, key=chart.values.__getitem__))


def _bars(chart: Chart, rng: SeededRandom) -> Fact:
    return Fact("bars", "How many bars are there?", str(len(chart.values)), other_than("345", str(len(chart.values))))


def _difference(chart: Chart, rng: SeededRandom) -> Fact:
    first, second = rng.sample(tuple(chart.values), 2)
    answer = abs(chart.values[first] - chart.values[second])
    return Fact("difference", f"What is the difference between {first} and {second}?", str(answer))


def _total(receipt: Receipt, rng: SeededRandom) -> Fact:
    return Fact("total", "What is the total?", money(sum(receipt.prices.values())))


def _price(receipt: Receipt, rng: SeededRandom) -> Fact:
    name = rng.choice(tuple(receipt.prices))
    return Fact("price", f"What is the price of the {name}?", money(receipt.prices[name]))


def _shop(receipt: Receipt, rng: SeededRandom) -> Fact:
    return Fact("shop", "Which animal is the shop named after?", receipt.shop)


def _receipt_number(receipt: Receipt, rng: SeededRandom) -> Fact:
    return Fact("receipt_number", "What is the number of the receipt?", receipt.number)


READING_FORMS: dict[type, dict[str, Callable[..., Fact]]] = {
    Poster: named(_text, _text_in_color, _line, _print_size, _number),
    Grid: named(_cell, _row_of_cell, _largest_in_column),
    Chart: named(_bar, _highest_bar, _bars, _difference),
    Receipt: named(_total, _price, _shop, _receipt_number),
}
"""What a page says -> form name -> function of that content and a `SeededRandom` that states a fact."""

_PLATE = ("text", "text", "text_in_color")
PAGE_FORMS: dict[str, tuple[str, ...]] = {
    "word": _PLATE,
    "digits": (*_PLATE, "number"),
    "code": _PLATE,
    "poster": ("text_in_color", "text_in_color", "line", "print_size", "number"),
    "grid": ("cell", "cell", "cell", "row_of_cell", "row_of_cell", "largest_in_column"),
    "chart": ("bar", "bar", "bar", "highest_bar", "bars", "difference"),
    "receipt": ("total", "price", "price", "shop", "receipt_number"),
}
"""Kind of page -> the forms that have one answer there, the more often as there is more to ask."""
