"""TextVQA, ChartQA, DocVQA and OCRBench: pages to read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from llava.mini.benchmarks.table import SOURCE, Quota, Row, Table, columns, table
from llava.mini.forms import Fact
from llava.mini.forms.reading import READING_FORMS
from llava.mini.pages import PAGES, render_page
from llava.mini.questions import SHORT, WORD
from llava.mini.scenes import IMAGE_SIZE
from llava.mini.seeded_random import SeededRandom


def _read(split: str, wanted: dict[tuple[str, str], int]) -> Iterator[tuple[int, Row, str, Fact]]:
    """Number, image, kind of page and fact of every question: for (kind, form) as many as wanted, one page each."""
    for kind in dict.fromkeys(kind for kind, _ in wanted):
        quota = Quota({form: n for (of, form), n in wanted.items() if of == kind})
        for seed in count():
            rng = SeededRandom("page", split, kind, seed)
            page = PAGES[kind](rng)
            fact = READING_FORMS[type(page.content)][quota.forms(rng)[0]](page.content, rng)
            if quota.take(fact):
                yield seed, {"image": render_page(page)}, kind, fact
            if not quota.open:
                break


def textvqa_val() -> list[Table]:
    """TextVQA: words and numbers of several sizes; ten answers, eight of them the plain right one."""
    wanted = {("poster", form): 50 for form in ("text_in_color", "line", "print_size", "number")}
    rows = []
    for i, (seed, image, _, fact) in enumerate(_read("textvqa_val", wanted)):
        row = {
            **image,
            "image_id": f"{seed:016x}",
            "question_id": i,
            "question": fact.question,
            "image_width": IMAGE_SIZE,
            "image_height": IMAGE_SIZE,
            "answers": [fact.answer] * 8 + ["not sure", "unclear"],
            "set_name": "val",
        }
        rows.append((f"{fact.question}\n{SHORT}", row))
    types = columns(
        "image_id question_id:int32 question question_tokens:[string] image:image image_width:int32 image_height:int32 "
        "flickr_original_url flickr_300k_url answers:[string] image_classes:[string] set_name ocr_tokens:[string]"
    )
    return [table("default", "validation", types, rows, "textvqa_val")]


def chartqa() -> list[Table]:
    """ChartQA: values (the augmented half of the real set), and questions that compare bars (the human half)."""
    wanted = {("chart", "bar"): 100, ("chart", "highest_bar"): 50, ("chart", "bars"): 24, ("chart", "difference"): 26}
    rows = []
    for _, image, _, fact in _read("chartqa", wanted):
        half = "augmented_test" if fact.form == "bar" else "human_test"
        row = {**image, "type": half, "question": fact.question, "answer": fact.answer}
        rows.append((f"{fact.question}\n{WORD}", row))
    return [table("default", "test", columns("type question answer image:image"), rows, "chartqa")]


def docvqa_val() -> list[Table]:
    """DocVQA: tables and receipts."""
    wanted = {
        ("grid", "cell"): 50,
        ("grid", "row_of_cell"): 30,
        ("grid", "largest_in_column"): 20,
        ("receipt", "total"): 30,
        ("receipt", "price"): 40,
        ("receipt", "shop"): 15,
        ("receipt", "receipt_number"): 15,
    }
    rows = []
    for i, (seed, image, kind, fact) in enumerate(_read("docvqa_val", wanted)):
        row = {
            **image,
            "questionId": str(i),
            "question": fact.question,
            "question_types": ["table/list" if kind == "grid" else "form"],
            "docId": seed,
            "ucsf_document_id": SOURCE,
            "ucsf_document_page_no": "1",
            "answers": [fact.answer],
            "data_split": "val",
        }
        rows.append((f"{fact.question}\n{SHORT}", row))
    types = columns(
        "questionId question question_types:[string] image:image docId:int64 ucsf_document_id ucsf_document_page_no "
        "answers:[string] data_split"
    )
    return [table("DocVQA", "validation", types, rows, "docvqa_val")]


# OCRBench form -> number of questions, and the type that OCRBench counts it under.
OCRBENCH_FORMS = {
    ("word", "text"): (40, "Regular Text Recognition"),
    ("digits", "text"): (30, "Digit String Recognition"),
    ("code", "text"): (30, "Non-Semantic Text Recognition"),
    ("poster", "text_in_color"): (20, "Scene Text-centric VQA"),
    ("poster", "print_size"): (20, "Scene Text-centric VQA"),
    ("grid", "cell"): (20, "Doc-oriented VQA"),
    ("chart", "bar"): (20, "Doc-oriented VQA"),
    ("receipt", "total"): (10, "Key Information Extraction"),
    ("receipt", "price"): (10, "Key Information Extraction"),
}


def ocrbench() -> list[Table]:
    """OCRBench: single texts to recognise, and questions about pages of every kind. At best 0.2: it counts to 1000."""
    rows = []
    for _, image, kind, fact in _read("ocrbench", {form: n for form, (n, _) in OCRBENCH_FORMS.items()}):
        _, sort = OCRBENCH_FORMS[kind, fact.form]
        row = {**image, "dataset": SOURCE, "question": fact.question, "question_type": sort, "answer": [fact.answer]}
        rows.append((fact.question, row))
    types = columns("dataset question question_type answer:[string] image:image")
    return [table("default", "test", types, rows, "ocrbench")]
