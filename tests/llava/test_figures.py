"""Figures from small result folders: what they show, that they are the same each time, and what they refuse."""

from __future__ import annotations

import csv
import importlib
import json
import math

import pytest

from llava.eval import figures, table
from llava.eval.plots.distances import MEAN, Distance, draw_distance, draw_relative_distance
from llava.eval.plots.drawing import spearman
from llava.eval.plots.scores import draw_gamma, draw_ratios, draw_safe, draw_time
from llava.eval.table import build_table, load_runs
from llava.mini.scenes import render, sample_scene
from run_folders import job, write_run

pytest.importorskip("matplotlib")

FULL = {"mini_gqa": [True] * 40 + [False] * 10, "mini_pope": [True] * 45 + [False] * 5}


def answered(share: float, **settings):
    right = round(50 * share)
    return job({task: [True] * right + [False] * (50 - right) for task in FULL}, **settings)


def rows_of(folder, jobs):
    return build_table(load_runs([write_run(folder, {"unpruned": job(FULL), **jobs})])).rows


def lines_of(path):
    return list(csv.DictReader(path.open()))


def lines(drawn, folder):
    return lines_of(drawn.save(folder).with_suffix(".csv"))


@pytest.fixture
def methods(tmp_path):
    """Three methods at one ratio, with distances that order them as their scores do, but for two benchmarks' swap."""
    jobs = {
        "otprune": answered(0.7, method="otprune", kept=56),
        "divprune": answered(0.6, method="divprune", kept=56),
        "first_k": answered(0.4, method="first_k", kept=56),
    }
    rows = rows_of(tmp_path / "run", jobs)
    distances = {"otprune": 1.0, "divprune": 1.5, "first_k": 4.0}
    return [
        Distance(row, benchmark, distances[row.family] + (benchmark == "GQA") * (row.family == "otprune"), 0.5, 9.0)
        for row in rows
        if row.pruned
        for benchmark in ("GQA", "POPE", MEAN)
    ]


def of_rows(rows):
    return [Distance(row, MEAN, 1.0, 0.5, 9.0) for row in rows if row.pruned]


class TestSpearman:
    @pytest.mark.parametrize(
        ("one", "other", "expected"),
        [([1, 2, 3], [10, 20, 40], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 2, 3, 4], [1, 3, 2, 4], 0.8)],
    )
    def test_is_the_correlation_of_ranks(self, one, other, expected):
        assert spearman(one, other) == pytest.approx(expected)

    def test_shares_ranks_among_ties_and_knows_nothing_of_a_constant(self):
        assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
        assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


class TestDistance:
    def test_says_the_correlation_of_nearness_and_score(self, methods, tmp_path):
        drawn = draw_distance(methods)
        assert "1.00 at ratio 0.098 (3 configurations)" in drawn.caption
        by_benchmark = {line["benchmark"]: float(line["spearman_of_benchmark"]) for line in lines(drawn, tmp_path)}
        assert by_benchmark == {"GQA": 0.5, "POPE": 1.0, "Mean": 1.0}

    def test_is_divided_by_otprune_s(self, methods, tmp_path):
        found = {(line["method"], line["benchmark"]): line for line in lines(draw_relative_distance(methods), tmp_path)}
        assert float(found["first_k", "POPE"]["relative_to_otprune"]) == 4.0
        assert float(found["divprune", "GQA"]["relative_to_otprune"]) == 0.75


def from_run_and_table(name, jobs, folder):
    """The lines of a figure's CSV, which are the same from a run and from its CSV table."""
    run = write_run(folder / "run", {"unpruned": job(FULL), **jobs})
    assert table.main([str(run), "--format", "csv", "--output", str(folder / "table.csv")]) == 0
    for given in (run, folder / "table.csv"):
        assert figures.main([name, str(given), "--output", str(folder / f"from_{given.stem}")]) == 0
    one, other = (lines_of(folder / f"from_{given}" / f"{name}.csv") for given in ("run", "table"))
    assert one == other
    return one


def test_ratios_show_scores_and_the_mean_of_every_ratio(tmp_path):
    jobs = {
        f"otprune-{ratio}": answered(0.5 + ratio, method="otprune", kept=576 * ratio, ratio=ratio)
        for ratio in (0.05, 0.2)
    }
    found = from_run_and_table("ratios", jobs, tmp_path)
    scores = {(line["ratio"], line["benchmark"]): float(line["score"]) for line in found}
    assert scores["0.2", "GQA"] == 70 and found[0]["low"]
    assert scores["0.05", "Mean"] < scores["0.2", "Mean"] < 100


def test_safe_ratios_are_the_smallest_that_keep_the_score(tmp_path):
    jobs = {}
    for method, ratio, share in (("otprune", 0.05, 0.4), ("otprune", 0.2, None), ("uniform", 0.2, 0.3)):
        settings = {"method": method, "kept": 576 * ratio, "ratio": ratio}
        jobs[f"{method}-{ratio}"] = job(FULL, **settings) if share is None else answered(share, **settings)
    found = from_run_and_table("safe", jobs, tmp_path)
    safe = {(line["method"], line["benchmark"]): line["safe_ratio"] for line in found}
    assert safe["otprune", "GQA"] == "0.2" and safe["uniform", "Mean"] == "none of those run"


class TestGamma:
    def test_orders_its_values(self, tmp_path):
        jobs = {
            f"gamma{gamma}": answered(share, method="otprune", kept=56, options={"gamma": gamma})
            for gamma, share in ((0.1, 0.6), (0.001, 0.5))
        }
        found = lines(draw_gamma(rows_of(tmp_path / "run", jobs)), tmp_path)
        assert [line["gamma"] for line in found] == ["0.001", "0.1"]


class TestTime:
    def test_names_what_is_no_slower_and_better(self, tmp_path):
        jobs = {
            "otprune": answered(0.6, method="otprune", kept=56, seconds=0.04),
            "fastv": answered(0.5, method="fastv", kept=186, layer=2, seconds=0.05),
        }
        found = {line["method"]: line for line in lines(draw_time(rows_of(tmp_path / "run", jobs)), tmp_path)}
        assert float(found["fastv 0.098, layer 2"]["milliseconds"]) == 50
        assert found["fastv 0.098, layer 2"]["no_slower_and_better"] == "otprune 0.098"
        assert found["otprune 0.098"]["no_slower_and_better"] == ""

    def test_leaves_out_what_encoding_took_where_that_is_known(self, tmp_path):
        """Of two rows that answer equally fast, the one that encoded for both is not slower."""
        jobs = {"unpruned": job(FULL, seconds=0.3), "otprune": answered(0.6, method="otprune", kept=56, seconds=0.1)}
        folder = write_run(tmp_path / "run", jobs)
        content = json.loads((folder / "results.json").read_text())
        for results, encoding, misses in zip(content["runs"], (0.2, 0.0), (50, 0), strict=True):
            for task in results["tasks"].values():
                task["throughput"]["avg_encoding_latency"] = encoding
                task["visual_cache"] = {"hits": 50 - misses, "misses": misses}
        (folder / "results.json").write_text(json.dumps(content))
        found = lines(draw_time(build_table(load_runs([folder])).rows), tmp_path)
        assert [float(line["milliseconds"]) for line in found] == pytest.approx([100, 100])

    def test_is_that_of_selection_and_prefill_where_it_was_measured(self, tmp_path):
        times = {"timing": {"selection_ms": 1.0, "prefill_ms": 9.0}}
        jobs = {"unpruned": job(FULL, **times), "otprune": answered(0.6, method="otprune", **times)}
        rows = build_table(load_runs([write_run(tmp_path / "run", jobs)])).rows
        assert {line["milliseconds"] for line in lines(draw_time(rows), tmp_path)} == {"10.0"}


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (draw_ratios, "at two ratios or more"),
        (draw_safe, "safe ratios need pruned runs with their logs"),
        (draw_gamma, "two values of gamma"),
        (lambda rows: draw_distance(of_rows(rows)), "needs 3 methods at one kept ratio"),
        (lambda rows: draw_relative_distance(of_rows(rows)), "needs otprune and another method"),
    ],
    ids=["ratios", "safe", "gamma", "distance", "relative_distance"],
)
def test_a_figure_of_one_configuration_is_refused(tmp_path, draw, said):
    rows = rows_of(tmp_path, {"otprune": answered(0.5, method="otprune", options={"gamma": 0.01})})
    with pytest.raises(ValueError, match=said):
        draw(rows)


class TestCommand:
    def test_writes_the_same_bytes_each_time(self, tmp_path):
        run = write_run(tmp_path / "run", {"unpruned": job(FULL), "otprune": answered(0.6, method="otprune", kept=56)})
        for name in ("a", "b"):
            assert figures.main(["time", str(run), "--output", str(tmp_path / name)]) == 0
        for file in ("time.png", "time.csv"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    def test_measures_distances_with_the_runs_model(self, tmp_path):
        pytest.importorskip("ot")
        jobs = {"unpruned": job(FULL)} | {
            name: answered(share, method=name, kept=56) for name, share in (("otprune", 0.6), ("uniform", 0.5))
        }
        jobs["first_k"] = answered(0.2, method="first_k", kept=56)
        (tmp_path / "pictures").mkdir()
        render(sample_scene(0, "validation")).save(tmp_path / "pictures" / "scene.png")
        given = [str(write_run(tmp_path / "run", jobs)), "--picture-folder", str(tmp_path / "pictures")]
        for name in ("distance", "relative_distance"):
            assert figures.main([name, *given, "--output", str(tmp_path / "figures")]) == 0
            assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 0
        said = (tmp_path / "figures" / "distance.csv").read_text()
        assert all(name in said for name in ("otprune", "uniform", "first_k"))

    @pytest.mark.parametrize(
        ("jobs", "said"),
        [
            ({"otprune": answered(0.6, method="otprune")}, "there is no unpruned run of llava-mini to compare with"),
            ({"unpruned": job({"mini_gqa": [True]})}, "the run is not complete: llava-mini/unpruned: mini_pope is not"),
            ({"unpruned": job({**FULL, "mini_gqa": [True]})}, "needs two runs with measured times"),
            ({"unpruned": {"logs": {}, "metrics": {}}}, "the run is not complete: llava-mini/unpruned has no finished"),
        ],
        ids=["no unpruned", "unfinished", "one method", "nothing"],
    )
    def test_answers_runs_that_it_cannot_show_with_one_sentence(self, tmp_path, capsys, jobs, said):
        assert figures.main(["time", str(write_run(tmp_path, jobs)), "--output", str(tmp_path / "figures")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "figures").exists()


class TestSynthetic:
    def test_finds_that_otprune_reaches_what_it_maximises_and_that_the_first_tokens_are_as_good_as_any(self):
        outcomes = synthetic().run([(20, 10, 5)], ("otprune", "first_k"), trials=12, subsets=20)
        found = {(one.method, one.measure): one for one in outcomes}
        # The greedy's guarantee is 63 % of the best subset, of which twenty random ones know nothing.
        assert found["otprune", "log_det"].win_rate > 90 and found["otprune", "log_det"].optimality > 95
        # The tokens are drawn independently.
        assert all(20 < found["first_k", measure].win_rate < 80 for measure in ("wasserstein", "log_det"))
        assert all(0 < one.optimality <= 100 for one in outcomes)
        assert outcomes == synthetic().run([(20, 10, 5)], ("otprune", "first_k"), trials=12, subsets=20)

    def test_shows_published_figures_beside_its_own_without_a_run(self, tmp_path, monkeypatch):
        outcomes = [synthetic().Outcome("otprune", "wasserstein", (20, 10, 5), 90.0, 80.0)]
        monkeypatch.setattr(synthetic(), "run", lambda progress: outcomes)
        assert figures.main(["synthetic", "--output", str(tmp_path)]) == 0
        assert {file.name for file in tmp_path.iterdir()} == {"synthetic.png", "synthetic.csv"}
        [line] = lines_of(tmp_path / "synthetic.csv")
        assert (line["win_rate"], line["published_win_rate"]) == ("90.0", "94.56")


def synthetic():
    pytest.importorskip("ot")
    return importlib.import_module("llava.eval.plots.synthetic")
