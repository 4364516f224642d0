"""Scores on the questions that a down-sampled image does not answer, and the smallest ratio that keeps a score."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import shutil

import numpy as np
import pytest

from llava.eval import table
from llava.eval.results.formats import FORMATS
from llava.eval.results.rows import MEAN
from llava.eval.results.safe import safe_cells, safe_ratios
from llava.eval.table import build_table, load_runs
from run_folders import job, write_run

TASKS = {"GQA": "mini_gqa", "POPE": "mini_pope"}


def drawn(seed: int, share: float, count: int = 60) -> dict[str, list[bool]]:
    """Which questions are answered right, for both tasks."""
    draw = random.Random(seed)
    return {task: [draw.random() < share for _ in range(count)] for task in TASKS.values()}


def settings(method: str, ratio: float, **options) -> dict:
    return {"method": method, "ratio": ratio, "kept": round(576 * ratio), **options}


def built(folder, jobs, **options):
    return build_table(load_runs([write_run(folder, jobs)]), draws=100, **options)


THREE = {"unpruned": job(drawn(0, 0.9))}
THREE |= {name: job(drawn(n, 0.6), **settings(name, 0.1)) for n, name in enumerate(("downsample", "otprune"), 1)}
TWO = {"unpruned": job(drawn(0, 0.9)), "otprune": job(drawn(1, 0.3), **settings("otprune", 0.1))}


class TestFilter:
    @pytest.mark.parametrize("seed", range(6))
    def test_scores_are_shares_of_what_unpruned_answers_and_downsample_does_not(self, tmp_path, seed):
        answers = {name: drawn(10 * seed + n, 0.7) for n, name in enumerate(("unpruned", "downsample", "otprune"))}
        jobs = {"unpruned": job(answers["unpruned"])}
        jobs |= {name: job(answers[name], **settings(name, 0.1)) for name in ("downsample", "otprune")}
        rows = {row.family: row for row in built(tmp_path, jobs, filtered=True).rows}
        expected = {}
        for key, task in TASKS.items():
            hard = [i for i in range(60) if answers["unpruned"][task][i] and not answers["downsample"][task][i]]
            assert rows["otprune"].filtered.questions[key] == len(hard)
            expected[key] = 100 * sum(answers["otprune"][task][i] for i in hard) / len(hard)
        assert rows["otprune"].filtered.scores == pytest.approx(expected)
        assert rows["otprune"].filtered.relative == pytest.approx(sum(expected.values()) / 2)
        assert set(rows["downsample"].filtered.scores.values()) == {0}
        assert rows["unpruned"].filtered is None

    def test_each_ratio_has_its_own_questions_and_a_row_without_one_is_named(self, tmp_path):
        jobs = {"unpruned": job(drawn(0, 0.9))}
        for n, (name, ratio) in enumerate(itertools.product(("downsample", "otprune"), (0.1, 0.2))):
            jobs[f"{name}-{ratio}"] = job(drawn(n, 0.6), **settings(name, ratio))
        jobs["fitprune"] = job(drawn(9, 0.6), **settings("fitprune", 0.3))
        made = built(tmp_path, jobs, filtered=True)
        counts = [row.filtered.questions for row in made.rows if row.family == "otprune"]
        assert counts[0] != counts[1]
        assert "Filter: without a run of downsample at their ratio, and left out: fitprune 0.3." in made.remarks

    def test_seeds_are_folded_and_tested_as_in_the_other_scores(self, tmp_path):
        answers = {seed: drawn(seed, 0.5) for seed in (1, 2)}
        jobs = {"unpruned": job(drawn(0, 0.9)), "downsample": job(drawn(7, 0.5), **settings("downsample", 0.1))}
        jobs |= {
            f"r{seed}": job(own, **settings("random", 0.1, options={"seed": seed})) for seed, own in answers.items()
        }
        jobs["otprune"] = job(drawn(3, 0.9), **settings("otprune", 0.1))
        single = [row for row in built(tmp_path, jobs, filtered=True).rows if row.family == "random"]
        folded = {row.family: row for row in built(tmp_path, jobs, filtered=True, folded=True).rows}
        mean = np.mean([row.filtered.scores["GQA"] for row in single])
        assert folded["random"].filtered.scores["GQA"] == pytest.approx(mean)
        low, high = folded["otprune"].filtered.interval(MEAN)
        assert low <= folded["otprune"].filtered.relative <= high
        assert folded["otprune"].filtered.evidence.random[MEAN].difference > 0

    def test_stands_in_every_format(self, tmp_path):
        made = built(tmp_path, THREE, filtered=True, intervals=True)
        questions = made.rows[2].filtered.questions
        for name in ("markdown", "latex", "html"):
            assert "questions at 0.1" in made.render(name)
        *_, line = csv.DictReader(io.StringIO(made.render("csv")))
        assert line["GQA_filtered_questions"] == str(questions["GQA"])
        assert json.loads(made.render("json"))["rows"][2]["filtered"]["questions"] == questions

    def test_has_neither_scores_nor_intervals_of_a_row_without_logs(self, tmp_path):
        run = write_run(tmp_path, THREE)
        shutil.rmtree(run / "llava-mini/otprune/tasks")
        made = build_table(load_runs([run]), draws=100, filtered=True, intervals=True)
        filtered = json.loads(made.render("json"))["rows"][2]["filtered"]
        assert (filtered["scores"], filtered["evidence"]) == ({}, None)

    def test_needs_a_row_of_downsample(self, tmp_path, capsys):
        run = write_run(tmp_path, TWO)
        assert table.main([str(run), "--filter", "downsample"]) == 2
        [said] = capsys.readouterr().err.splitlines()
        assert "the filter needs an unpruned run and one of downsample at the kept ratio of the others" in said


class TestSafe:
    def jobs(self, seed: int) -> dict:
        draw = random.Random(seed)
        jobs = {"unpruned": job(drawn(seed, 0.8, 80))}
        for method in ("otprune", "uniform"):
            for ratio in draw.sample([0.05, 0.1, 0.2, 0.5], draw.randint(1, 4)):
                # Answers of the unpruned row, of which some are lost.
                own = {
                    task: [one and draw.random() > 0.02 / ratio**0.5 for one in right]
                    for task, right in drawn(seed, 0.8, 80).items()
                }
                if draw.random() < 0.5:
                    own = drawn(seed, 0.8, 80)
                jobs[f"{method}-{ratio}"] = job(own, **settings(method, ratio))
        return jobs

    @pytest.mark.parametrize("seed", range(6))
    def test_is_the_first_ratio_whose_interval_stays_above_the_share(self, tmp_path, seed):
        rows = built(tmp_path, self.jobs(seed), intervals=True).rows
        for share in (0.9, 0.99):
            for one in safe_ratios(rows, share):
                own = sorted((row for row in rows if row.family == one.method), key=lambda row: row.ratio)
                assert one.tried == tuple(row.ratio for row in own)
                for key in ("GQA", "POPE", MEAN):
                    safe = [row.ratio for row in own if row.evidence.shares[key][0] >= 100 * share]
                    assert one.ratios[key] == (min(safe) if safe else None)

    def test_the_interval_is_that_of_the_quotient_on_the_same_questions(self, tmp_path):
        full, own = np.array(drawn(1, 0.8, 200)["mini_gqa"]), np.array(drawn(2, 0.7, 200)["mini_gqa"])
        jobs = {"unpruned": job({"mini_gqa": full.tolist()})}
        jobs["otprune"] = job({"mini_gqa": own.tolist()}, **settings("otprune", 0.1))
        rows = build_table(load_runs([write_run(tmp_path, jobs)]), intervals=True).rows
        dice = np.random.default_rng(0)
        picks = dice.integers(0, 200, size=(4000, 200))
        expected = np.quantile(100 * own[picks].sum(1) / full[picks].sum(1), [0.025, 0.975])
        assert rows[1].evidence.shares["GQA"] == pytest.approx(expected, abs=1.5)

    @pytest.mark.parametrize("name", FORMATS)
    def test_stands_in_every_format(self, tmp_path, capsys, name):
        run = write_run(tmp_path, TWO)
        assert table.main([str(run), "--safe", "0.99", "--draws", "50", "--format", name]) == 0
        said = capsys.readouterr().out
        assert "Ratios run" in said and "none of those run" in said

    def test_each_column_stands_once(self, tmp_path):
        header, _ = safe_cells(safe_ratios(built(tmp_path, TWO, intervals=True).rows, 0.99))
        assert header == ["Model", "Method", "Ratios run", "GQA", "POPE", "Mean"]

    def test_without_logs_it_says_what_it_needs(self, tmp_path, capsys):
        assert table.main([str(write_run(tmp_path, {"unpruned": job(drawn(0, 0.8))})), "--safe", "0.99"]) == 2
        assert "safe ratios need pruned runs with their logs" in capsys.readouterr().err
