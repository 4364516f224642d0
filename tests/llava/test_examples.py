"""The questions that a report opens with: which are taken, and how their answers are told."""

from __future__ import annotations

import re
from statistics import mean

import pytest
from PIL import Image

from llava import benchmark_tasks
from llava.eval import report
from llava.eval.examples import find_examples
from llava.eval.table import build_table, load_runs
from llava.mini.scenes import render, sample_scene
from run_folders import write_run

SHORT = "\nAnswer the question using a single word or phrase."
OPTIONS = (
    " There are several options:\nA. cat\nB. sun\nAnswer with the option's letter from the given choices directly."
)
# Question, true answer, then what is answered by unpruned, otprune, random.
GQA = [
    ("What color is the ring?" + SHORT, "red", "blue", "red", "blue"),
    ("What shape is green?" + SHORT, "ring", "ring", "Ring.", "ring"),
    ("What size is the star?" + SHORT, "large", "large", "large", "small"),
    ("What shape is the small one?" + SHORT, "star", "star", "cross", "star"),
]
SEED = [
    ("Which shape is that?" + OPTIONS, "A", "A", "A", "B"),
    ("What is written on the sign?" + OPTIONS, "B", "B", "b", "A"),
]
NAMES = ("unpruned", "otprune", "random")


class Task:
    """A benchmark whose documents are asked as the logs say, with an image each."""

    def __init__(self, questions):
        self.eval_docs = range(len(questions))
        self.doc_to_text = lambda number: questions[number][0]
        self.doc_to_visual = lambda number: [Image.new("RGB", (28, 28), (40 * number, 0, len(questions)))]


@pytest.fixture
def data(monkeypatch):
    found = {"mini_gqa": Task(GQA), "mini_seedbench": Task(SEED)}
    monkeypatch.setattr(benchmark_tasks, "load_tasks", lambda name: {name: found[name]})
    return found


def samples(questions, place, record):
    return [{"input": asked, "target": truth, **record(said[place], truth)} for asked, truth, *said in questions]


def gqa_record(said, truth):
    return {"filtered_resps": [said], "exact_match": float(said == truth)}


def seed_record(said, truth):
    return {"filtered_resps": said, "seed_image": {"pred": said, "answer": truth}}


@pytest.fixture
def folder(tmp_path):
    jobs = {}
    for place, name in enumerate(NAMES):
        gqa, seed = samples(GQA, place, gqa_record), samples(SEED, place, seed_record)
        right = [one["filtered_resps"].upper() == one["target"] for one in seed]
        jobs[name] = {
            "logs": {"mini_gqa": gqa, "mini_seedbench": seed},
            "metrics": {
                "mini_gqa": {"exact_match": mean(one["exact_match"] for one in gqa)},
                "mini_seedbench": {"seed_image": mean(right)},
            },
            "method": None if name == "unpruned" else name,
            "kept": 576 if name == "unpruned" else 56,
        }
    return write_run(tmp_path / "run", jobs, tasks=("mini_gqa", "mini_seedbench"))


@pytest.fixture
def rows(folder):
    return build_table(load_runs([folder])).rows


def told(example):
    return [(answer.text, answer.right) for answer in example.answers]


class TestExamples:
    def test_are_the_first_that_tell_the_methods_apart(self, rows, data):
        examples, missing = find_examples(rows)
        assert missing == []
        assert [(one.kind, one.benchmark, one.question, one.truth) for one in examples] == [
            ("Objects", "GQA", "What size is the star?", "large"),
            ("Text", "SEED-I", "What is written on the sign?", "B: sun"),
            ("Something small", "GQA", "What shape is the small one?", "star"),
        ]
        assert told(examples[0]) == [("large", True), ("large", True), ("small", False)]
        assert told(examples[1]) == [("B: sun", True), ("B: sun", True), ("A: cat", False)]

    def test_are_of_different_images(self, rows, data):
        data["mini_gqa"].doc_to_visual = lambda number: [Image.new("RGB", (28, 28))]
        data["mini_seedbench"].doc_to_visual = lambda number: [Image.new("RGB", (28, 28), "white")]
        examples, missing = find_examples(rows)
        assert [one.kind for one in examples] == ["Objects", "Text"]
        assert missing == ["an example of something small: no benchmark in the runs asks about it"]

    def test_are_never_of_other_data_than_were_asked_about(self, rows, data):
        data["mini_gqa"].doc_to_text = lambda number: "What else?"
        examples, missing = find_examples(rows)
        assert [one.kind for one in examples] == ["Text"]
        assert "an example of objects: the data of mini_gqa are not those that the runs were asked about" in missing

    def test_need_data_that_are_at_hand(self, rows, monkeypatch):
        def none(name):
            raise OSError(f"the data of the task {name} cannot be had: offline")

        monkeypatch.setattr(benchmark_tasks, "load_tasks", none)
        examples, missing = find_examples(rows)
        assert examples == []
        assert missing[0] == "an example of objects: the data of the task mini_gqa cannot be had: offline"


def test_the_report_opens_with_them(folder, data, tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("ot")
    data["mini_gqa"].doc_to_visual = lambda number: [render(sample_scene(number, "validation"))]
    output = tmp_path / "report.html"
    assert report.main([str(folder), "--pictures", "1", "--draws", "20", "--output", str(output)]) == 0
    text = output.read_text()
    assert text.index('id="kept"') < text.index('id="table"')
    [opened] = re.findall(
        r'<section class="card">.*?GQA</div>\s*<h3>What shape is the small one.*?</section>', text, re.S
    )
    assert "True answer: <b>star</b>" in opened
    for name, count, mark, said in (
        ("unpruned", 576, "right", "\N{CHECK MARK} star"),
        ("otprune", 56, "wrong", "\N{BALLOT X} cross"),
        ("random", 56, "right", "\N{CHECK MARK} star"),
    ):
        tokens = f'<span class="count">{count}</span> of 576 tokens</span>'
        shown = f'<b>{name}</b><br><span class="soft">{tokens}<br><span class="{mark}" title="{mark}">{said}</span>'
        assert shown in opened
