"""Result folders that are not as a run leaves them: older, newer, damaged, cut, of other shapes."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava.eval import figures, report, table
from run_folders import job, write_run

RIGHT = {"mini_gqa": [True, False, True], "mini_pope": [True, True, False]}
JOBS = {
    "unpruned": job(RIGHT),
    "otprune": job(RIGHT, method="otprune", kept=56),
    "random": job(RIGHT, method="random", kept=56, options={"seed": 1}),
}
OTHERS = (None, True, 0, -1, 2.5, float("nan"), float("inf"), 10**400)
OTHERS += ("", "x", "/x", "**", [], [1], ["x"], {}, {"x": 1}, [[]], [{}])
BYTES = (b"", b"\xff\xfe{", b"{", b"[" * 100_000, b"null", b"[]", b"3", b'"x"', b"{}", b'{"runs": null}', b"\0\0\0")


def places(content: Any, here: tuple = ()) -> list[tuple]:
    """Every place inside of a JSON value, itself left out."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [place for key in keys for place in ((*here, key), *places(content[key], (*here, key)))]


def damage(file: Path, dice: random.Random) -> str:
    """Change one thing in a file, or the file; returns what."""
    kind = dice.choice(("value", "value", "value", "key", "bytes", "cut", "gone", "folder"))
    if kind in ("value", "key"):
        *before, line = file.read_text().split("\n") if file.suffix == ".jsonl" else [file.read_text()]
        content = json.loads(line or before.pop())
        place = dice.choice(places(content))
        inside = content
        for key in place[:-1]:
            inside = inside[key]
        if kind == "key":
            del inside[place[-1]]
        else:
            inside[place[-1]] = copy.deepcopy(dice.choice(OTHERS))
        file.write_text("\n".join([*before, json.dumps(content)]))
        return f"{kind} {place} {inside if kind == 'key' else inside[place[-1]]}"
    whole = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "cut":
        file.write_bytes(whole[: dice.randrange(len(whole))])
    elif kind != "gone":
        file.write_bytes(dice.choice(BYTES))
    return kind


COMMANDS = {
    "table": lambda run, out: table.main([str(run), "--intervals", "--draws", "20", "--output", str(out)]),
    "csv": lambda run, out: table.main(
        [str(run), "--format", "csv", "--draws", "20", "--fold-seeds", "--allow-mixed", "--output", str(out)]
    ),
    "figures": lambda run, out: figures.main(["time", str(run), "--draws", "20", "--output", str(out)]),
    "report": lambda run, out: report.main([str(run), "--no-model", "--draws", "20", "--output", str(out)]),
}

DRAWN = ("figures", "report")
"""A second each."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("whole") / "run", JOBS)


@pytest.mark.parametrize("name", COMMANDS)
def test_are_shown_or_answered_with_one_sentence(whole, tmp_path, capsys, name):
    dice = random.Random(f"damaged {name}")
    for number in range(5 if name in DRAWN else 40):
        run = tmp_path / str(number)
        shutil.copytree(whole, run)
        # The file that holds most of what is shown is damaged most often.
        files = sorted(path for path in run.rglob("*") if path.is_file())
        file = dice.choice([*files, *[run / "results.json"] * len(files)])
        what = f"{file.relative_to(run)}: {damage(file, dice)}"
        try:
            status = COMMANDS[name](run, tmp_path / "out")
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
        said = capsys.readouterr()
        assert status in (0, 2), what
        if status:
            assert said.err.count("\n") == 1 and len(said.err) < 600, (what, said.err)


def changed(path: Path, change) -> str:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def test_one_configuration_that_cannot_be_read_is_named_under_the_others(run, capsys):
    changed(run / "results.json", lambda content: content["runs"][1]["pruning"].pop("options"))
    assert table.main([str(run), "--intervals", "--draws", "20"]) == 0
    shown = capsys.readouterr().out
    assert f"Left out: {run / 'results.json'} cannot be read: pruning has no options." in shown
    assert "| unpruned |" in shown and "| random (seed 1) 0.098 |" in shown and "otprune" not in shown
    # The others keep their logs.
    assert shown.count("66.67 [") == 2


def test_a_figure_of_the_rest_is_refused(run, capsys, tmp_path):
    changed(run / "results.json", lambda content: content["runs"][1].pop("failed"))
    assert figures.main(["time", str(run), "--output", str(tmp_path)]) == 2
    said = f"{run / 'results.json'} cannot be read: it has no failed"
    assert capsys.readouterr().err == f"python -m llava.eval.figures: {said}\n"


@pytest.mark.parametrize("path", ["results.json", "llava-mini/unpruned/results.json"])
def test_of_a_later_version_are_refused(run, capsys, path):
    place = changed(run / path, lambda content: content.update(format=2))
    assert table.main([str((run / path).parent)]) == 2
    said = f"{place} cannot be read: it has format 2, and this version of llava reads formats up to 1"
    assert capsys.readouterr().err == f"python -m llava.eval.table: {said}\n"


def test_a_score_that_is_none_is_not_shown(run, capsys):
    def forget(content):
        for results in content.get("runs", [content]):
            if results["pruning"] and results["pruning"]["method"] == "otprune":
                results["tasks"]["mini_gqa"]["metrics"]["exact_match"] = float("nan")

    for name in ("results.json", "llava-mini/otprune/results.json"):
        changed(run / name, forget)
    assert table.main([str(run), "--format", "csv", "--draws", "20"]) == 0
    assert "nan" not in capsys.readouterr().out
