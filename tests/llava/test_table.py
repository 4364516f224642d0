"""The table that is read from result folders."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from llava.eval import table
from llava.eval.table import COLUMNS, Row, build_table, load_runs

TOKENS = {
    "images": 9,
    "total": {"min": 576, "mean": 576.0, "max": 576},
    "kept": {"min": 56, "mean": 56.0, "max": 56},
    "per_layer": [56.0, 56.0, 56.0, 56.0],
    "flops": {"literature": {"pruned": 1, "unpruned": 8}, "exact": {"pruned": 1, "unpruned": 4}},
    "flops_ratio": {"literature": 0.125, "exact": 0.25},
}
OLDER_TOKENS = {name: TOKENS[name] for name in ("images", "total", "kept")}


def run(model: str = "me/llava-mini", method: str | None = None, **changes) -> dict:
    pruning = None
    if method:
        pruning = {"method": method, "ratio": 0.098, "layer": 0, "options": {"seed": 1}, "set_options": []}
    return {
        "suite": "mini",
        "model": model,
        "trained": True,
        "pruning": pruning,
        "limit": None,
        "visual_tokens": TOKENS,
        "tasks": {"mini_pope": {"metrics": {"pope_f1_score": 0.8 if method is None else 0.6}}},
        "failed": {},
        **changes,
    }


@pytest.fixture
def folder(tmp_path):
    def write(*runs: dict) -> Path:
        (tmp_path / "results.json").write_text(json.dumps({"runs": list(runs)}))
        return tmp_path

    return write


def lines(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_json_table_says_which_metric_a_column_of_no_benchmark_shows(folder):
    tasks = {"vqav2_val": {"metrics": {"exact_match": 0.5}}, "mini_pope": {"metrics": {"pope_f1_score": 0.8}}}
    columns = json.loads(build_table(load_runs([folder(run(tasks=tasks))])).render("json"))["columns"]
    assert [column["key"] for column in columns] == [*(column.key for column in COLUMNS), "vqav2_val"]
    assert columns[-1] == {"key": "vqav2_val", "tasks": ["vqav2_val"], "metric": "exact_match"}


def test_a_row_stands_for_each_configuration_and_a_column_for_each_benchmark(folder):
    header, _, unpruned, pruned = lines(
        build_table(load_runs([folder(run(), run(method="otprune"))])).render("markdown")
    )
    assert header[:4] == ["Model", "Method", "Kept tokens", "Prefill FLOPs / unpruned"]
    paper = [column.key for column in COLUMNS if column.group == "paper"]
    assert header[4:] == [*paper, "Mean", "Rank"] and len(paper) == 11
    assert unpruned[:4] == ["llava-mini", "unpruned", "56 / 576 (9.7 %)", "25.0 %"]
    assert pruned[1] == "otprune 0.098"
    assert unpruned[header.index("POPE")] == "80.00"
    assert pruned[header.index("POPE")] == "60.00"
    assert unpruned[header.index("GQA")] == "\N{EN DASH}"


def test_a_model_that_was_shown_grey_pictures_is_no_unpruned_one(folder):
    blind = run(grey=True, tasks={"mini_pope": {"metrics": {"pope_f1_score": 0.4}}})
    grey, unpruned = lines(build_table(load_runs([folder(blind, run())])).render("markdown"))[2:]
    assert (grey[1], grey[-2]) == ("grey picture", "50.0 %")
    assert (unpruned[1], unpruned[-2]) == ("unpruned", "100.0 %")


def test_the_mean_is_taken_over_shares_of_the_unpruned_scores(folder):
    full = run(tasks={"mini_pope": {"metrics": {"pope_f1_score": 0.8}}, "mini_gqa": {"metrics": {"exact_match": 0.5}}})
    half = run(
        method="otprune",
        tasks={"mini_pope": {"metrics": {"pope_f1_score": 0.6}}, "mini_gqa": {"metrics": {"exact_match": 0.25}}},
    )
    rows = build_table(load_runs([folder(full, half)])).rows
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
def test_scores_are_shown_on_the_papers_scale(folder, task, metric, value, shown):
    text = build_table(load_runs([folder(run(tasks={task: {"metrics": {metric: value}}}))])).render("markdown")
    assert shown in lines(text)[2]


def test_what_a_reader_must_know_is_said(folder):
    text = build_table(load_runs([folder(run(trained=False, limit=8, failed={"mini_gqa": "ValueError: x"}))])).render(
        "markdown"
    )
    assert "Mini suite: " in text
    assert "llava-mini (untrained)" in text
    assert "llava-mini (untrained): mini_gqa failed." in text
    assert "Limited: first 8 documents per task." in text


class TestPublished:
    def test_figures_stand_beside_the_real_checkpoint_s_rows_and_are_marked(self, folder):
        real = run(model="liuhaotian/llava-v1.5-7b", suite="paper")
        made = build_table(load_runs([folder(real)]))
        assert made.rows[0].source == "measured"
        assert all(row.published for row in made.rows[1:])
        text = made.render("markdown")
        assert "otprune 0.098 *(published)*" in text
        assert "Published: OTPrune (arXiv 2602.20205)" in text

    def test_means_compare_a_source_with_itself(self, folder):
        rows = build_table(load_runs([folder(run(model="liuhaotian/llava-v1.5-7b", suite="paper"))])).rows
        [otprune] = [row for row in rows if row.published and row.method == "otprune"]
        shares = [56.62 / 61.96, 60.40 / 64.09, 1368 / 1506, 79.59 / 85.84, 68.42 / 69.41]
        assert otprune.relative == pytest.approx(100 * sum(shares) / 5)

    def test_figures_never_stand_beside_the_mini_suite(self, folder):
        assert len(build_table(load_runs([folder(run(model="me/llava-v1.5-7b"))])).rows) == 1


@pytest.mark.parametrize(
    ("pruning", "label"),
    [
        (
            {"method": "pyramiddrop", "ratio": None, "layer": None, "options": {"schedule": "published"}},
            "pyramiddrop (schedule published)",
        ),
        ({"method": "vtw", "ratio": None, "layer": 4, "options": {}}, "vtw, layer 4"),
        ({"method": "fastv", "ratio": 0.098, "layer": 2, "options": {}}, "fastv 0.098, layer 2"),
        ({"method": "sparsevlm", "ratio": 0.2, "layer": None, "options": {}}, "sparsevlm 0.2"),
        ({"method": "otprune", "ratio": 1.0, "layer": 0, "options": {}}, "otprune 1"),
        ({"method": "random", "ratio": 0.1, "layer": 2, "options": {"seed": 7}}, "random (seed 7) 0.1, layer 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_label_says_what_there_is_of_options_ratio_and_layer(folder, pruning, label):
    path = folder(run(pruning={**pruning, "set_options": list(pruning["options"])}))
    made = build_table(load_runs([path]))
    assert made.rows[0].label == label
    assert lines(made.render("markdown"))[2][1] == label
    [line] = csv.DictReader(io.StringIO(made.render("csv")))
    assert line["ratio"] == ("" if pruning["ratio"] is None else str(pruning["ratio"]))
    assert json.loads(made.render("json"))["rows"][0]["layer"] == pruning["layer"]


class TestBudget:
    def test_is_given_in_full_to_programs(self, folder):
        tokens = {**TOKENS, "kept": {"min": 186, "mean": 186.0, "max": 186}, "per_layer": [576.0, 576.0, 56.0, 56.0]}
        made = build_table(load_runs([folder(run(visual_tokens=tokens))]))
        [line] = csv.DictReader(io.StringIO(made.render("csv")))
        [row] = json.loads(made.render("json"))["rows"]
        assert (line["kept_tokens_mean"], line["total_tokens_mean"]) == ("186.0", "576.0")
        assert (line["flops_ratio_literature"], line["flops_ratio_exact"]) == ("0.125", "0.25")
        assert [float(number) for number in line["kept_tokens_per_layer"].split()] == tokens["per_layer"]
        assert {name: row[name] for name in table.BUDGET} == {
            "kept_tokens_mean": 186.0,
            "total_tokens_mean": 576.0,
            "kept_tokens_per_layer": tokens["per_layer"],
            "flops_ratio_literature": 0.125,
            "flops_ratio_exact": 0.25,
        }

    def test_of_older_results_is_shown_as_far_as_it_is_known(self, folder):
        older = run(method="otprune", visual_tokens=OLDER_TOKENS)
        inside = run(method="fastv", visual_tokens=OLDER_TOKENS)
        inside["pruning"]["layer"] = 2
        made = build_table(load_runs([folder(older, inside, run(visual_tokens=None))]))
        dash = "\N{EN DASH}"
        # What such a result calls kept is what the decoder's last layer saw.
        assert [line[2:4] for line in lines(made.render("markdown"))[2:]] == [
            ["56 / 576 (9.7 %)", dash],
            [dash, dash],
            [dash, dash],
        ]
        assert not any(remark.startswith("FLOPs") for remark in made.remarks)
        first, _, last = csv.DictReader(io.StringIO(made.render("csv")))
        assert (first["kept_tokens_mean"], first["kept_tokens_per_layer"], first["flops_ratio_exact"]) == (
            "56.0",
            "",
            "",
        )
        assert (last["kept_tokens_mean"], last["total_tokens_mean"]) == ("", "")


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="no table format 'xls'; there are markdown, csv, json, latex, html"):
        build_table([Row("m", "unpruned", 1.0, {})]).render("xls")


class TestCommand:
    def test_writes_to_standard_output_or_a_file(self, folder, tmp_path, capsys):
        path = str(folder(run()))
        assert table.main([path]) == 0
        printed = capsys.readouterr().out
        assert table.main([path, "--format", "csv", "--output", str(tmp_path / "t.csv")]) == 0
        assert printed.startswith("| Model |")
        assert (tmp_path / "t.csv").read_text().startswith("model,")
