"""Intervals, tests, ranks, folded seeds and mixed runs, on result folders with per-sample logs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from llava.benchmarks import BENCHMARKS as COLUMNS
from llava.eval import table
from llava.eval.results.evidence import draw_scores, interval
from llava.eval.results.samples import right_answers, units_of
from llava.eval.table import build_table, load_runs
from run_folders import job, write_run

BY_KEY = {column.key: column for column in COLUMNS}
FULL = {"mini_gqa": [True] * 40 + [False] * 10, "mini_pope": [True] * 45 + [False] * 5}
WORSE = {"mini_gqa": [True] * 20 + [False] * 30, "mini_pope": [True] * 25 + [False] * 25}
SAME_BUT_ONE = {"mini_gqa": [True] * 39 + [False] * 11, "mini_pope": [True] * 45 + [False] * 5}
RANDOM = {"method": "random", "kept": 56, "options": {"seed": 0}}


def made(folder, jobs, **options):
    return build_table(load_runs([write_run(folder, jobs)]), **options)


def by_label(built):
    return {row.label: row for row in built.rows}


def logged(metric, *records):
    """Samples with these records of a metric."""
    return [{"doc_id": number, metric: record} for number, record in enumerate(records)]


class TestIntervals:
    def test_of_a_mean_are_the_percentiles_of_the_binomial(self):
        units = units_of(BY_KEY["GQA"], logged("exact_match", *(float(n < 75) for n in range(100))))
        low, high = interval(draw_scores([units], "GQA", draws=4000)[0])
        # 95 % of Binomial(100, 0.75) / 100 lies within 0.66 .. 0.83
        assert low == pytest.approx(0.66, abs=0.015)
        assert high == pytest.approx(0.83, abs=0.015)

    def test_stand_beside_every_score_and_are_the_same_each_time(self, tmp_path):
        jobs = {"unpruned": job(FULL), "otprune": job(WORSE, method="otprune", kept=56)}
        first, second = (made(tmp_path, jobs, intervals=True).render("json") for _ in range(2))
        assert first == second
        evidence = json.loads(first)["rows"][1]["evidence"]
        low, high = evidence["intervals"]["GQA"]
        assert 25 < low < 40 < high < 55
        assert set(evidence["intervals"]) == {"GQA", "POPE", "Mean"}

    def test_are_written_where_a_person_asked_for_them(self, tmp_path):
        built = made(tmp_path, {"unpruned": job(FULL)}, intervals=True)
        assert "80.00 [" in built.render("markdown", intervals=True)
        assert "[" not in built.render("markdown")

    def test_are_left_out_where_the_log_is_not_that_of_the_results(self, tmp_path):
        wrong = job(FULL)
        wrong["metrics"]["mini_gqa"] = {"exact_match": 0.5}
        built = made(tmp_path, {"unpruned": wrong}, intervals=True)
        assert "GQA" not in built.rows[0].evidence.intervals
        assert "No interval of GQA, llava-mini/unpruned: the log gives 80, the results say 50." in built.remarks


SAID = {("yes", "yes"): 6, ("no", "yes"): 2, ("yes", "no"): 3, ("yes", "maybe"): 1, ("no", "no"): 4}
MME = [("ocr", "a", 1), ("ocr", "a", 1), ("ocr", "b", 1), ("ocr", "b", 0), ("sum", "c", 0), ("sum", "c", 0)]


class TestUnits:
    @pytest.mark.parametrize(
        ("key", "names", "records", "value", "right"),
        [
            ("OKVQA", None, [1.0, 0.5, 0.3, 0.0], 0.45, [1, 1, 0, 0]),
            ("SEED-I", ("pred", "answer"), ["bB", "BB", "AB"], 2 / 3, [1, 1, 0]),
            (
                "MMMU",
                ("question_type", "answer", "parsed_pred"),
                [("multiple-choice", "A", [said]) for said in "AABA"],
                0.75,
                [1, 1, 0, 1],
            ),
            (
                "MMB",  # a question has to be right in every order of its options
                ("index", "answer", "prediction"),
                [(1, "A", "A"), (1_000_001, "B", "C"), (2, "D", "D"), (1_000_002, "A", "A")],
                50.0,
                [0, 1],
            ),
            ("MME-P", ("category", "question_id", "score"), MME, (200 + 50) / 2 + 0, [1, 1, 1, 0, 0, 0]),
            (
                "POPE",  # F1 of precision 6 / 8 and recall 6 / 9, as lmms-eval counts it
                ("ground_truth", "prediction"),
                [pair for pair, count in SAID.items() for _ in range(count)],
                2 * (6 / 8) * (6 / 9) / (6 / 8 + 6 / 9),
                [a == b for (a, b), count in SAID.items() for _ in range(count)],
            ),
        ],
    )
    def test_give_the_benchmarks_score_and_the_questions_that_are_right(self, key, names, records, value, right):
        records = [dict(zip(names, record, strict=True)) for record in records] if names else records
        samples = logged(BY_KEY[key].logged, *records)
        if key == "SEED-I":
            samples.append({"doc_id": len(records), "seed_video": {"pred": "A", "answer": "B"}})
        assert units_of(BY_KEY[key], samples).value == pytest.approx(value)
        assert list(right_answers(BY_KEY[key], samples).values()) == right

    def test_of_mme_are_images_drawn_within_their_category(self):
        records = [dict(zip(("category", "question_id", "score"), record, strict=True)) for record in MME]
        units = units_of(BY_KEY["MME-P"], logged("mme_perception_score", *records))
        # The only image of "sum" is always drawn once: the other category's two give 200, 125 or 50.
        assert set(np.round(draw_scores([units], "MME-P", draws=200)[0], 6)) == {200.0, 125.0, 50.0}

    def test_of_captions_are_images_by_document_whatever_the_order_of_the_log(self):
        units = units_of(BY_KEY["COCO"], [{"doc_id": 1}, {"doc_id": 0}], cider=[0.5, 2.5])
        assert units.parts[:, 0].tolist() == [2.5, 0.5]
        assert units.value == 1.5
        assert right_answers(BY_KEY["COCO"], logged("coco_CIDEr", {"pred": "a", "answer": ["a"]})) == {}


class TestComparisons:
    def test_find_a_large_difference_and_no_small_one(self, tmp_path):
        jobs = {
            "unpruned": job(FULL),
            "otprune": job(WORSE, method="otprune", kept=56),
            "divprune": job(SAME_BUT_ONE, method="divprune", kept=56),
        }
        rows = by_label(made(tmp_path, jobs, intervals=True))
        worse = rows["otprune 0.098"].evidence.unpruned
        assert worse["GQA"].difference == pytest.approx(-40)
        assert worse["GQA"].p < 0.01
        assert worse["GQA"].high < 0
        assert worse["Mean"].p < 0.01
        assert rows["divprune 0.098"].evidence.unpruned["GQA"].p > 0.05
        assert rows["unpruned"].evidence.unpruned == {}

    def test_are_paired(self, tmp_path):
        """Ten questions more are a difference of one sign in every draw, though the intervals overlap."""
        samples = [logged("exact_match", *(float(n < right) for n in range(100))) for right in (50, 60)]
        one, other = draw_scores([units_of(BY_KEY["GQA"], own) for own in samples], "GQA", draws=500)
        assert (other >= one).all()

    def test_with_random_are_with_the_mean_of_its_seeds_at_the_same_budget(self, tmp_path):
        jobs = {
            "unpruned": job(FULL),
            "otprune": job(SAME_BUT_ONE, method="otprune", kept=56),
            "random0": job(WORSE, **RANDOM),
            "random1": job(SAME_BUT_ONE, **{**RANDOM, "options": {"seed": 1}}),
            "random-more": job(FULL, **{**RANDOM, "kept": 120, "ratio": 0.2}),
        }
        rows = by_label(made(tmp_path, jobs, intervals=True))
        assert rows["otprune 0.098"].evidence.random["GQA"].difference == pytest.approx(78 - (40 + 78) / 2)
        assert rows["random (seed 0) 0.098"].evidence.random == {}

    def test_are_not_made_between_different_questions(self, tmp_path):
        jobs = {"unpruned": job(FULL), "otprune": job(WORSE, method="otprune", data="2-bbbb")}
        rows = by_label(made(tmp_path, jobs, intervals=True, allow_mixed=True))
        assert rows["otprune 0.098"].evidence.unpruned == {}
        assert set(rows["otprune 0.098"].evidence.intervals) == {"GQA", "POPE"}


SEEDS = {
    "unpruned": job(FULL),
    "random0": job(WORSE, **RANDOM),
    "random1": job(SAME_BUT_ONE, **{**RANDOM, "options": {"seed": 1}}),
}


class TestFoldedSeeds:
    def test_are_one_row_of_means_with_their_spread(self, tmp_path):
        rows = by_label(made(tmp_path, SEEDS, folded=True, intervals=True))
        folded = rows["random (mean of 2 seeds) 0.098"]
        assert folded.scores["GQA"] == pytest.approx((40 + 78) / 2)
        assert folded.seed_spread["GQA"] == pytest.approx(38 / math.sqrt(2))
        low, high = folded.evidence.intervals["GQA"]
        assert low < 59 < high

    def test_are_no_other_runs_of_the_same_seed_or_of_none(self, tmp_path):
        """Two versions of everything: each has its unpruned row, and its own mean over the seeds."""
        other = {"versions": {"torch": "2.7"}}
        second = {"unpruned": job(SAME_BUT_ONE, **other), "uniform": job(WORSE, method="uniform", kept=56, **other)}
        second |= {f"random{seed}": job(WORSE, **{**RANDOM, "options": {"seed": seed}}, **other) for seed in (0, 1)}
        first = {**SEEDS, "uniform": job(FULL, method="uniform", kept=56)}
        folders = [write_run(tmp_path / "a", first), write_run(tmp_path / "b", second)]
        rows = build_table(load_runs(folders), folded=True, allow_mixed=True).rows
        assert [row.label for row in rows].count("unpruned") == 2
        assert [row.label for row in rows].count("uniform 0.098") == 2
        folded = [row for row in rows if row.label == "random (mean of 2 seeds) 0.098"]
        assert [row.scores["GQA"] for row in folded] == pytest.approx([(40 + 78) / 2, 40])
        assert len(rows) == 6

    def test_are_not_two_runs_of_one_seed_or_of_none_that_scored_otherwise(self, tmp_path):
        scored = (("a", FULL), ("b", WORSE))
        folders = [
            write_run(tmp_path / name, {"unpruned": job(own), "random": job(own, **RANDOM)}) for name, own in scored
        ]
        rows = build_table(load_runs(folders), folded=True, allow_mixed=True).rows
        assert sorted(row.label for row in rows) == ["random (seed 0) 0.098"] * 2 + ["unpruned"] * 2


class TestRanks:
    def test_are_averaged_over_columns_among_rows_of_one_budget(self, tmp_path):
        jobs = {
            "unpruned": job(FULL),
            "otprune": job({**WORSE, "mini_pope": [True] * 50}, method="otprune", kept=56),
            "divprune": job(SAME_BUT_ONE, method="divprune", kept=56),
            "fastv": job(FULL, method="fastv", kept=186, layer=2),
        }
        rows = by_label(made(tmp_path, jobs))
        assert rows["otprune 0.098"].rank == 1.5
        assert rows["divprune 0.098"].rank == 1.5
        assert rows["fastv 0.098, layer 2"].rank is None
        assert rows["unpruned"].rank is None


class TestMixedRuns:
    def test_of_another_version_are_refused_or_marked(self, tmp_path):
        jobs = {"unpruned": job(FULL), "otprune": job(WORSE, method="otprune", versions={"torch": "2.7"})}
        said = r"not alike in version of torch \(2.6: llava-mini/unpruned; 2.7: llava-mini/otprune\)"
        with pytest.raises(ValueError, match=said):
            made(tmp_path, jobs)
        remarks = made(tmp_path, jobs, allow_mixed=True).remarks
        assert "Mixed: version of torch differs (2.6: llava-mini/unpruned; 2.7: llava-mini/otprune)." in remarks

    def test_of_other_data_or_another_limit_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="not alike in data"):
            made(tmp_path, {"a": job(FULL), "b": job(WORSE, method="otprune", data="2-bbbb")})
        with pytest.raises(ValueError, match="not alike in limit on the documents"):
            made(tmp_path, {"a": job(FULL), "b": job(WORSE, method="otprune", limit=8)})

    def test_of_one_configuration_stand_once_or_are_refused(self, tmp_path):
        first = write_run(tmp_path / "a", {"unpruned": job(FULL)})
        again = write_run(tmp_path / "b", {"unpruned": job(FULL)})
        other = write_run(tmp_path / "c", {"unpruned": job(WORSE)})
        assert len(build_table(load_runs([first, again])).rows) == 1
        with pytest.raises(ValueError, match="two runs of llava-mini, unpruned, have different scores"):
            build_table(load_runs([first, other]))


class TestTimes:
    def test_have_columns_once_a_row_has_them(self, tmp_path):
        timing = {"selection_ms": 1.25, "prefill_ms": 20.0}
        built = made(tmp_path, {"unpruned": job(FULL), "otprune": job(WORSE, method="otprune", timing=timing)})
        lines = built.render("markdown").splitlines()
        assert "| Selection ms | Prefill ms |" in lines[0]
        assert "| 1.25 | 20.00 |" in lines[3]
        assert "| \N{EN DASH} | \N{EN DASH} |" in lines[2]
        assert "Selection ms" not in made(tmp_path / "plain", {"unpruned": job(FULL)}).render("markdown")


def test_latex_is_escaped_and_html_is_one_page_of_its_own(tmp_path):
    built = made(tmp_path, {"unpruned": job(FULL), "first_k": job(WORSE, method="first_k")})
    latex, html = built.render("latex"), built.render("html")
    assert latex.startswith(r"\begin{tabular}{lll") and r"first\_k 0.098" in latex and r"100.0 \%" in latex
    assert html.startswith("<!doctype html>") and "<td>unpruned</td>" in html
    assert "http" not in html and "<script" not in html


class TestIncompleteRuns:
    def test_are_said_under_the_table(self, tmp_path, capsys):
        folder = write_run(tmp_path, {"unpruned": job({"mini_gqa": FULL["mini_gqa"]})})
        assert table.main([str(folder)]) == 0
        assert "Incomplete: llava-mini/unpruned: mini_pope is not finished." in capsys.readouterr().out

    def test_with_nothing_finished_are_refused_in_one_sentence(self, tmp_path, capsys):
        folder = write_run(tmp_path, {"unpruned": {"logs": {}, "metrics": {}}})
        assert table.main([str(folder)]) == 2
        assert capsys.readouterr().err == f"python -m llava.eval.table: no finished task in {folder}\n"

    def test_with_a_torn_log_have_no_interval_there_and_say_its_line(self, tmp_path, capsys):
        folder = write_run(tmp_path, {"unpruned": job(FULL)})
        [log] = folder.glob("llava-mini/unpruned/tasks/mini_gqa/*/*.jsonl")
        log.write_text(log.read_text()[:-5])
        assert table.main([str(folder), "--intervals"]) == 0
        shown = capsys.readouterr().out
        assert f"No interval of GQA, llava-mini/unpruned: its log is not as expected ({log}, line 50, cannot" in shown
        assert "| 80.00 |" in shown and "| 94.74 [" in shown


def test_a_draw_in_which_the_unpruned_model_scores_nothing_leaves_the_mean_without_an_interval(tmp_path):
    jobs = {
        "unpruned": job({"mini_gqa": [True, False, False]}),
        "otprune": job({"mini_gqa": [True, True, False]}, method="otprune"),
    }
    row = made(tmp_path, jobs, intervals=True).rows[1]
    assert row.relative == pytest.approx(200)
    assert set(row.evidence.intervals) == {"GQA"}
    assert set(row.evidence.unpruned) == {"GQA"}
