"""The report and the page of token maps: whole, self-contained, the same each time, and never half-empty."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from llava.eval.token_page import Answer, selection_html, token_page
from llava.pruning import PruningConfig
from run_folders import job, write_run

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from llava.eval import report

FULL = {"mini_gqa": [True] * 40 + [False] * 10, "mini_pope": [True] * 45 + [False] * 5}
WORSE = {"mini_gqa": [True] * 20 + [False] * 30, "mini_pope": [True] * 25 + [False] * 25}
JOBS = {
    "unpruned": job(FULL),
    "otprune": job(WORSE, method="otprune", kept=56, seconds=0.04),
    "otprune-0.2": job(FULL, method="otprune", kept=115, ratio=0.2, seconds=0.06),
}


class Addresses(HTMLParser):
    """Whatever a page would load or go to, and whether its tags close."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "input", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    output = folder / "report.html"
    assert report.main([str(write_run(folder / "run", JOBS)), "--no-model", "--output", str(output)]) == 0
    return output.read_text()


class TestReport:
    def test_needs_nothing_from_elsewhere(self, text):
        page = Addresses(text)
        assert page.open == []
        assert page.found
        assert all(address.startswith(("data:", "#")) for address in page.found)
        assert "@import" not in text and "url(" not in text

    def test_holds_the_table_with_intervals_and_the_figures(self, text):
        assert re.search(r"<td>40\.00<br><small>\[\d+\.\d+, \d+\.\d+\]\u2020</small></td>", text)
        assert '<h2 id="ratios">' in text and '<h2 id="safe">' in text and '<h2 id="time">' in text
        assert text.count("data:image/png;base64,") == 3

    def test_says_what_is_not_in_it_in_one_folded_line(self, text):
        assert '<details id="left-out"><summary>Not in this report: ' in text
        assert "the figure of gamma needs runs of otprune with two values of gamma" in text
        assert '<h2 id="gamma">' not in text

    def test_marks_the_best_of_each_column_among_equal_budgets(self, tmp_path):
        jobs = {
            "unpruned": job(FULL),
            "otprune": job({**WORSE, "mini_gqa": [True] * 30 + [False] * 20}, method="otprune", kept=56),
            "uniform": job({**WORSE, "mini_gqa": [True] * 29 + [False] * 21}, method="uniform", kept=56),
            "more": job(FULL, method="otprune", kept=115, ratio=0.2),
        }
        output = tmp_path / "report.html"
        assert report.main([str(write_run(tmp_path / "run", jobs)), "--no-model", "--output", str(output)]) == 0
        text = output.read_text()
        # GQA, the mean and the rank; POPE's scores are equal, and at the other budgets a row is alone.
        marked = re.findall(r"<strong>(.*?)</strong>", text)
        assert marked[0] == "60.00" and len(marked) == 3 and marked[2] == "1.25"
        assert "Bold: the best of the rows of one model that keep equally many tokens" in text

    def test_holds_the_scores_on_the_filter_s_questions_where_asked(self, tmp_path):
        jobs = JOBS | {"downsample": job({**WORSE, "mini_gqa": [False] * 50}, method="downsample", kept=56)}
        given = [str(write_run(tmp_path / "run", jobs)), "--no-model", "--output", str(tmp_path / "report.html")]
        assert report.main([*given, "--filter", "downsample"]) == 0
        text = (tmp_path / "report.html").read_text()
        assert "<td>questions at 0.098</td><td></td><td>40</td><td>20</td><td>60</td>" in text

    def test_holds_the_numbers_as_files(self, text):
        [address] = re.findall(r'download="table.json" href="data:application/json;base64,([^"]+)"', text)
        rows = json.loads(base64.b64decode(address))["rows"]
        assert [row["method"] for row in rows] == ["unpruned", "otprune", "otprune"]

    def test_is_the_same_each_time(self, text, tmp_path):
        report.main([str(write_run(tmp_path / "run", JOBS)), "--no-model", "--output", str(tmp_path / "again.html")])
        assert (tmp_path / "again.html").read_text() == text


class View:
    name = "image"
    image = Image.new("RGB", (40, 40), (10, 20, 30))
    patches = np.arange(4).reshape(2, 2)


class TestTokenPage:
    def test_is_one_page_that_needs_nothing_from_elsewhere(self):
        page = Addresses(token_page([View], {"otprune": [3, 0]}, "a <cat>.png"))
        assert page.open == [] and page.found == []

    def test_lists_places_in_the_order_of_the_selection_and_none_for_a_newline(self):
        text = selection_html([View], {"unpruned": None, "otprune": [3, 0, 9]}, "cat.png")
        data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text).group(1))
        assert data["methods"] == [
            {"name": "unpruned", "places": None},
            {"name": "otprune", "places": [[0, 1, 1], [0, 0, 0], None]},
        ]
        assert re.findall(r'<b>(.*?)</b>.*?"count">(\d+)</span> of 4', text) == [("unpruned", "4"), ("otprune", "2")]
        assert (data["views"][0]["rows"], data["views"][0]["columns"]) == (2, 2)

    def test_cannot_be_broken_out_of_by_a_name(self):
        assert "<i>" not in token_page([View], {"x": [0]}, "<i>")
        assert "<i>" not in selection_html([View], {"x": [0]}, "x", {"x": Answer("<i>", True)})
        assert "</script><b>" not in selection_html([View], {"</script><b>": [0]}, "x")


def test_maps_are_of_one_ratio():
    """Of several, that at which most methods were run; the smaller one of two."""
    named = [(f"{name} {ratio}", PruningConfig(name, ratio)) for name in ("otprune", "uniform") for ratio in (0.2, 0.1)]
    assert [label for label, _ in report.at_one_ratio(named)] == ["otprune 0.1", "uniform 0.1"]
    more = [*named, ("random 0.2", PruningConfig("random", 0.2))]
    assert [label for label, _ in report.at_one_ratio(more)] == ["otprune 0.2", "uniform 0.2", "random 0.2"]
    assert report.at_one_ratio([]) == []


def test_a_picture_that_is_not_there_is_told_first(tmp_path, capsys):
    run = write_run(tmp_path, {"unpruned": job({"mini_gqa": [True]})})
    assert report.main([str(run), "--image", "none.png", "--output", str(tmp_path / "report.html")]) == 2
    assert "none.png" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
