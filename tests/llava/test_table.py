"""The table that is read from result folders."""

from __future__ import annotations

import csv
import io
import json

import pytest

from llava.eval import table
from llava.eval.table import COLUMNS, Row, build_table, load_runs

TOKENS = {
    "total": {"mean": 576.0},
    "kept": {"mean": 56.0},
    "per_layer": [56.0, 56.0, 56.0, 56.0],
    "flops_ratio": {"literature": 0.125, "exact": 0.25},
}
OLDER_TOKENS = {name: TOKENS[name] for name in ("total", "kept")}
BASE = {"suite": "mini", "model": "me/llava-mini", "trained": True, "limit": None, "failed": {}}


def run(method: str | None = None, **changes) -> dict:
    pruning = method and {"method": method, "ratio": 0.098, "layer": 0, "options": {"seed": 1}, "set_options": []}
    tasks = {"mini_pope": {"metrics": {"pope_f1_score": 0.6 if method else 0.8}}}
    return {**BASE, "visual_tokens": TOKENS, "pruning": pruning, "tasks": tasks, **changes}


@pytest.fixture
def made(tmp_path):
    """The table of a whole run."""

    def write(*runs: dict):
        (tmp_path / "results.json").write_text(json.dumps({"runs": list(runs)}))
        return build_table(load_runs([tmp_path]))

    return write


def lines(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_json_table_says_which_metric_a_column_of_no_benchmark_shows(made):
    tasks = {"vqav2_val": {"metrics": {"exact_match": 0.5}}, "mini_pope": {"metrics": {"pope_f1_score": 0.8}}}
    columns = json.loads(made(run(tasks=tasks)).render("json"))["columns"]
    assert [column["key"] for column in columns] == [*(column.key for column in COLUMNS), "vqav2_val"]
    assert columns[-1] == {"key": "vqav2_val", "tasks": ["vqav2_val"], "metric": "exact_match"}


def test_a_row_stands_for_each_configuration_and_a_column_for_each_benchmark(made):
    header, _, unpruned, pruned = lines(made(run(), run(method="otprune")).render("markdown"))
    assert header[:4] == ["Model", "Method", "Kept tokens", "Prefill FLOPs / unpruned"]
    paper = [column.key for column in COLUMNS if column.group == "paper"]
    assert header[4:] == [*paper, "Mean", "Rank"] and len(paper) == 11
    assert unpruned[:4] == ["llava-mini", "unpruned", "56 / 576 (9.7 %)", "25.0 %"]
    assert pruned[1] == "otprune 0.098"
    assert unpruned[header.index("POPE")] == "80.00"
    assert pruned[header.index("POPE")] == "60.00"
    assert unpruned[header.index("GQA")] == "\N{EN DASH}"


def test_a_model_that_was_shown_grey_pictures_is_no_unpruned_one(made):
    blind = run(grey=True, tasks={"mini_pope": {"metrics": {"pope_f1_score": 0.4}}})
    grey, unpruned = lines(made(blind, run()).render("markdown"))[2:]
    assert (grey[1], grey[-2]) == ("grey picture", "50.0 %")
    assert (unpruned[1], unpruned[-2]) == ("unpruned", "100.0 %")


def test_the_mean_is_taken_over_shares_of_the_unpruned_scores(made):
    def tasks(pope: float, gqa: float) -> dict:
        return {"mini_pope": {"metrics": {"pope_f1_score": pope}}, "mini_gqa": {"metrics": {"exact_match": gqa}}}

    rows = made(run(tasks=tasks(0.8, 0.5)), run(method="otprune", tasks=tasks(0.6, 0.25))).rows
    assert rows[0].relative == pytest.approx(100.0)
    assert rows[1].relative == pytest.approx(100 * (0.75 + 0.5) / 2)


@pytest.mark.parametrize(
    ("task", "metric", "value", "shown"),
    [
        ("mme", "mme_perception_score", 1368.4, "1368"),
        ("mini_mmbench_en_dev", "gpt_eval_score", 60.4, "60.40"),
        ("mmbench_en_dev_static", "gpt_eval_score", 60.4, "60.40"),
        ("coco2017_cap_val", "coco_CIDEr", 0.96, "0.96"),
        ("ok_vqa_val2014", "exact_match", 0.4698, "46.98"),
        ("seedbench", "seed_image", 0.5947, "59.47"),
    ],
)
def test_scores_are_shown_on_the_papers_scale(made, task, metric, value, shown):
    text = made(run(tasks={task: {"metrics": {metric: value}}})).render("markdown")
    assert shown in lines(text)[2]


def test_what_a_reader_must_know_is_said(made):
    text = made(run(trained=False, limit=8, failed={"mini_gqa": "ValueError: x"})).render("markdown")
    assert "Mini suite: " in text
    assert "llava-mini (untrained)" in text
    assert "llava-mini (untrained): mini_gqa failed." in text
    assert "Limited: first 8 documents per task." in text


class TestPublished:
    def test_figures_stand_beside_the_real_checkpoint_s_rows_and_are_marked(self, made):
        real = run(model="liuhaotian/llava-v1.5-7b", suite="paper")
        table = made(real)
        assert table.rows[0].source == "measured"
        assert all(row.published for row in table.rows[1:])
        text = table.render("markdown")
        assert "otprune 0.098 *(published)*" in text
        assert "Published: OTPrune (arXiv 2602.20205)" in text

    def test_means_compare_a_source_with_itself(self, made):
        rows = made(run(model="liuhaotian/llava-v1.5-7b", suite="paper")).rows
        [otprune] = [row for row in rows if row.published and row.method == "otprune"]
        shares = [56.62 / 61.96, 60.40 / 64.09, 1368 / 1506, 79.59 / 85.84, 68.42 / 69.41]
        assert otprune.relative == pytest.approx(100 * sum(shares) / 5)

    def test_figures_never_stand_beside_the_mini_suite(self, made):
        assert len(made(run(model="me/llava-v1.5-7b")).rows) == 1


@pytest.mark.parametrize(
    ("pruning", "label"),
    [
        (("pyramiddrop", None, None, {"schedule": "published"}), "pyramiddrop (schedule published)"),
        (("vtw", None, 4, {}), "vtw, layer 4"),
        (("fastv", 0.098, 2, {}), "fastv 0.098, layer 2"),
        (("sparsevlm", 0.2, None, {}), "sparsevlm 0.2"),
        (("otprune", 1.0, 0, {}), "otprune 1"),
        (("random", 0.1, 2, {"seed": 7}), "random (seed 7) 0.1, layer 2"),
    ],
)
def test_a_label_says_what_there_is_of_options_ratio_and_layer(made, pruning, label):
    pruning = dict(zip(("method", "ratio", "layer", "options"), pruning, strict=True))
    table = made(run(pruning={**pruning, "set_options": list(pruning["options"])}))
    assert table.rows[0].label == label
    assert lines(table.render("markdown"))[2][1] == label
    [line] = csv.DictReader(io.StringIO(table.render("csv")))
    assert line["ratio"] == ("" if pruning["ratio"] is None else str(pruning["ratio"]))
    assert json.loads(table.render("json"))["rows"][0]["layer"] == pruning["layer"]


class TestBudget:
    def test_is_given_in_full_to_programs(self, made):
        layers = [576.0, 576.0, 56.0, 56.0]
        built = made(run(visual_tokens={**TOKENS, "kept": {"mean": 186.0}, "per_layer": layers}))
        expected = dict(zip(table.BUDGET, (186.0, 576.0, layers, 0.125, 0.25), strict=True))
        [line] = csv.DictReader(io.StringIO(built.render("csv")))
        [row] = json.loads(built.render("json"))["rows"]
        assert {name: row[name] for name in table.BUDGET} == expected
        assert [float(number) for number in line.pop("kept_tokens_per_layer").split()] == layers
        assert all(line.get(name, str(value)) == str(value) for name, value in expected.items())

    def test_of_older_results_is_shown_as_far_as_it_is_known(self, made):
        inside = run(method="fastv", visual_tokens=OLDER_TOKENS)
        inside["pruning"]["layer"] = 2
        built = made(run(method="otprune", visual_tokens=OLDER_TOKENS), inside, run(visual_tokens=None))
        dash = "\N{EN DASH}"
        # What such a result calls kept is what the decoder's last layer saw.
        shown = [line[2:4] for line in lines(built.render("markdown"))[2:]]
        assert shown == [["56 / 576 (9.7 %)", dash], [dash, dash], [dash, dash]]
        assert not any(remark.startswith("FLOPs") for remark in built.remarks)
        first, _, last = csv.DictReader(io.StringIO(built.render("csv")))
        assert [first[name] for name in table.BUDGET] == ["56.0", "576.0", "", "", ""]
        assert [last[name] for name in table.BUDGET] == [""] * 5


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="no table format 'xls'; there are markdown, csv, json, latex, html"):
        build_table([Row("m", "unpruned", 1.0, {})]).render("xls")


def test_the_command_writes_to_standard_output_or_a_file(made, tmp_path, capsys):
    made(run())
    assert table.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert table.main([str(tmp_path), "--format", "csv", "--output", str(tmp_path / "t.csv")]) == 0
    assert printed.startswith("| Model |")
    assert (tmp_path / "t.csv").read_text().startswith("model,")
