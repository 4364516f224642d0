"""Pages to read and questions about them: print that fits, answers that stand on the page, the real tasks' scores."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from itertools import combinations

import numpy as np
import pytest

from llava.benchmarks import DOCUMENTS
from llava.mini import suite
from llava.mini.benchmarks import BUILDERS
from llava.mini.font import GLYPH_HEIGHT, text_width
from llava.mini.forms.reading import READING_FORMS
from llava.mini.pages import PAGES, Box, Page, Text, money, render_page
from llava.mini.scenes import COLORS
from llava.mini.seeded_random import SeededRandom


@pytest.fixture(scope="module")
def pages() -> list[Page]:
    return [draw(SeededRandom("test", kind, seed)) for kind, draw in PAGES.items() for seed in range(60)]


@pytest.fixture(scope="module")
def tables():
    return {benchmark.name: BUILDERS[benchmark.name]()[0] for benchmark in suite.tasks_of(DOCUMENTS).values()}


def area(mark: Text | Box) -> tuple[int, int, int, int]:
    """Left, top, right, bottom."""
    if isinstance(mark, Box):
        return mark.x, mark.y, mark.x + mark.width, mark.y + mark.height
    width, height = text_width(mark.text, mark.scale), GLYPH_HEIGHT * mark.scale
    return mark.x, mark.y, mark.x + width, mark.y + height


def test_print_fits_on_the_page_and_no_two_texts_touch(pages):
    for page in pages:
        areas = [area(mark) for mark in page.marks]
        assert min(min(left, top) for left, top, _, _ in areas) >= 0
        assert max(max(right, bottom) for _, _, right, bottom in areas) <= 336
        texts = [area(mark) for mark in page.marks if isinstance(mark, Text)]
        for a, b in combinations(texts, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (page, a, b)


def test_print_stands_out_from_the_paper(pages):
    for page in pages[::7]:
        image = np.asarray(render_page(page)).astype(int)
        assert image.shape == (336, 336, 3)
        for mark in page.marks:
            left, top, right, bottom = area(mark)
            assert (image[top:bottom, left:right] == mark.rgb).all(-1).any()
            assert abs(np.subtract(mark.rgb, page.paper)).max() > 60


def answer_on_page(page: Page, form: str, question: str) -> str:
    """The answer as a reader finds it: from what is printed, and from the bars."""
    texts = [mark for mark in page.marks if isinstance(mark, Text)]
    words = re.findall(r"[a-z]+|[0-9]+", question)
    at = {mark.text: mark for mark in texts}
    if form == "text":
        return texts[0].text
    if form == "number":
        return next(mark.text for mark in texts if mark.text.isdecimal())
    if form == "text_in_color":
        return next(mark.text for mark in texts if mark.rgb == COLORS[words[-1]])
    if form in ("line", "print_size"):
        key = (lambda mark: mark.y) if form == "line" else (lambda mark: mark.scale)
        return (min if words[-1] == "top" or "smallest" in words else max)(texts, key=key).text
    if form == "cell":
        row, column = at[words[-3]], at[words[-1]]
        return next(mark.text for mark in texts if (mark.x, mark.y) == (column.x, row.y))
    if form in ("row_of_cell", "largest_in_column"):
        cells = [mark for mark in texts if mark.x == at[words[-1]].x and mark.text.isdecimal()]
        if form == "row_of_cell":
            cell = next(mark for mark in cells if mark.text == words[-3])
        else:
            cell = (max if "largest" in words else min)(cells, key=lambda mark: int(mark.text))
        return next(mark.text for mark in texts if mark.y == cell.y and mark.text.isalpha())
    if form in ("bar", "highest_bar", "bars", "difference"):
        boxes = [mark for mark in page.marks if isinstance(mark, Box) and mark.height > 1]
        heights = {}
        for name in (mark for mark in texts if mark.text.isalpha()):
            middle = name.x + text_width(name.text, name.scale) // 2
            heights[name.text] = next(b.height // 2 for b in boxes if b.x <= middle < b.x + b.width)
        if form == "bars":
            return str(len(boxes))
        if form == "highest_bar":
            return (max if "highest" in words else min)(heights, key=heights.get)
        if form == "difference":
            return str(abs(heights[words[-1]] - heights[words[-3]]))
        return str(heights[words[-1]])
    if form == "shop":
        return next(mark.text for mark in texts if mark.text.endswith(" shop")).split()[0]
    if form == "receipt_number":
        return next(mark.text for mark in texts if mark.y == at["no"].y and mark.text.isdecimal())
    prices = {mark.y: mark.text for mark in texts if "." in mark.text}
    if form == "price":
        return prices[at[words[-1]].y]
    *parts, total = (round(100 * float(prices[y])) for y in sorted(prices))
    assert sum(parts) == total
    return money(total)


def test_answers_stand_on_the_page(pages):
    asked = set()
    for number, page in enumerate(pages):
        single = len(page.marks) == 1
        for form, state in READING_FORMS[type(page.content)].items():
            if single != (form == "text"):
                continue
            fact = state(page.content, SeededRandom("ask", number))
            assert fact.answer == answer_on_page(page, form, fact.question), fact
            assert fact.form == form and fact.answer not in fact.wrong
            asked.add(form)
    assert asked == {form for forms in READING_FORMS.values() for form in forms}


def test_rows_and_pixels_are_the_same_on_every_machine(tables):
    recorded = suite._recorded(DOCUMENTS)
    for benchmark in suite.tasks_of(DOCUMENTS).values():
        data, table = benchmark.data, tables[benchmark.name]
        assert recorded[f"{data.folder}/{data.config}/{data.split}"] == {
            "rows": 200,
            "sha256": suite.table_hash(table.rows),
        }


def test_the_tables_are_stored_in_their_types(tables, tmp_path):
    datasets, parquet = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    for name, table in tables.items():
        suite._write_tables(tmp_path / name, [replace(table, rows=table.rows[:5])])
        stored = parquet.read_table(tmp_path / name / table.config / f"{table.split}.parquet")
        stored = datasets.Dataset(datasets.table.InMemoryTable(stored))
        assert set(stored.features) == set(table.columns)
        assert suite.table_hash(stored) == suite.table_hash(table.rows[:5])


SHORT = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase."}
WORD = {"pre_prompt": "", "post_prompt": "\nAnswer the question with a single word."}


@pytest.mark.parametrize("right", [True, False])
def test_the_real_tasks_ask_and_score_them(tables, right):
    pytest.importorskip("lmms_eval.tasks")
    textvqa, chartqa, docvqa, ocrbench = (
        import_module(f"lmms_eval.tasks.{name}.utils") for name in ("textvqa", "chartqa", "docvqa", "ocrbench")
    )
    anls = import_module("lmms_eval.api.metrics").anls
    ways = {
        "textvqa_val": (
            lambda doc: textvqa.textvqa_doc_to_text(doc, SHORT),
            lambda doc, said: textvqa.textvqa_process_results(doc, [said])["exact_match"],
        ),
        "chartqa": (
            lambda doc: chartqa.chartqa_doc_to_text(doc, WORD),
            lambda doc, said: chartqa.chartqa_process_results(doc, [said])["relaxed_overall"],
        ),
        "docvqa_val": (
            lambda doc: docvqa.docvqa_doc_to_text(doc, SHORT),
            lambda doc, said: anls(doc["answers"], [said])["anls"],
        ),
        "ocrbench": (
            lambda doc: ocrbench.ocrbench_doc_to_text(doc, {}),
            lambda doc, said: ocrbench.ocrbench_process_results(doc, [said])["ocrbench_accuracy"]["score"],
        ),
    }
    for name, (ask, score) in ways.items():
        table = tables[name]
        assert [ask(row) for row in table.rows] == table.prompts
        for row in table.rows:
            answers = row.get("answers", row.get("answer"))
            answer = answers if isinstance(answers, str) else answers[0]
            # TextVQA's code writes into the row's own list.
            row = {**row, "answers": list(answers)} if "answers" in row else row
            assert score(row, answer.upper() if right else "+") == right, (name, row)
    assert {row["question_type"] for row in tables["ocrbench"].rows} <= set(ocrbench.OCRBench_score)
