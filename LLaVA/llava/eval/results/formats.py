"""Writes tables as Markdown, CSV, JSON, LaTeX and HTML, and reads CSV tables back."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava.benchmarks import BENCHMARKS, Benchmark, columns_of, shown_columns
from llava.eval import page
from llava.eval.results.evidence import Evidence
from llava.eval.results.rows import MEAN, RANK, Row, best_of_columns
from llava.files import csv_text

FORMATS = ("markdown", "csv", "json", "latex", "html")
MISSING = "\N{EN DASH}"
FLOPS = "Prefill FLOPs / unpruned"
TIMES = ("selection", "prefill")
SIGNIFICANT = 0.05
WORDS = 3
"""Columns of words, at the left."""
BEST = "Bold: the best of the rows of one model that keep equally many tokens (within a tenth)."
COUNTS = ("kept_tokens_mean", "total_tokens_mean", "kept_tokens_per_layer")
BUDGET = (*COUNTS, "flops_ratio_literature", "flops_ratio_exact")
"""Columns of the CSV table and keys of the JSON table; tokens per layer are in one cell, separated by spaces."""
WORDS_OF_CSV = ("model", "method", "source", "kept_tokens_per_layer", "notes")
_DAGGER, _DOUBLE_DAGGER = "\N{DAGGER}", "\N{DOUBLE DAGGER}"
_LATEX = {character: rf"\{character}" for character in "%_&#"} | {
    MISSING: "--",
    _DAGGER: r"\textsuperscript{\dag}",
    _DOUBLE_DAGGER: r"\textsuperscript{\ddag}",
}
Cells = tuple[list[str], list[list[str]]]
"""A table for people: its header, and its lines as text."""


def render(rows: Sequence[Row], remarks: Sequence[str], name: str, intervals: bool) -> str:
    """A table of scores in one of the `FORMATS`."""
    if name == "csv":
        return _csv(rows)
    if name == "json":
        return _json(rows, remarks)
    if name == "html":
        return table_html(rows, [*remarks, *best_is_marked(rows)], intervals, whole=True)
    return text_of(_tables(rows, intervals, " *(published)*" if name == "markdown" else " (published)"), remarks, name)


def render_cells(table: Cells, remarks: Sequence[str], name: str) -> str:
    """Any other table in one of the `FORMATS`."""
    header, lines = table
    if name == "csv":
        return csv_text(header, lines)
    if name == "json":
        return _dumped({"rows": [dict(zip(header, line, strict=True)) for line in lines], "remarks": remarks})
    if name == "html":
        return page.render("table.html.jinja", tables=[_shown_cells(table)], remarks=remarks, whole=True)
    return text_of([table], remarks, name)


def named(row: Row) -> str:
    """The model as it is shown."""
    return f"{row.model} (untrained)" if "untrained" in row.notes else row.model


def cells(rows: Sequence[Row], intervals: bool, published: str = "") -> Cells:
    """The table for people; ``published`` follows the method of rows that are published figures."""
    times = [part for part in TIMES if any(row.milliseconds(part) is not None for row in rows)]
    header = ["Model", "Method", "Kept tokens", FLOPS, *(f"{part.capitalize()} ms" for part in times)]
    columns = _columns(rows)
    header += [*(column.key for column in columns), MEAN, RANK]
    lines = []
    for row in rows:
        flops = row.flops_ratio("exact")
        line = [named(row), row.label + published * row.published, _kept(row)]
        line += [_shown(None if flops is None else 100 * flops, 1, " %")]
        line += [_shown(row.milliseconds(part), 2) for part in times]
        line += [_score(row, column.key, column.digits, intervals) for column in columns]
        lines.append([*line, _score(row, MEAN, 1, intervals, " %"), _shown(row.rank, 2)])
    return header, lines


def filtered_cells(rows: Sequence[Row], intervals: bool) -> Cells:
    """The same of `Row.filtered`, at each ratio below the numbers of questions."""
    filtered = [row.filtered for row in rows if row.filtered]
    keys = [column.key for column in BENCHMARKS if any(column.key in row.questions for row in filtered)]
    lines, before = [], None
    for row in filtered:
        if (row.model, row.ratio) != before:
            before = row.model, row.ratio
            counts = [row.questions.get(key, 0) for key in keys]
            lines.append([named(row), f"questions at {row.ratio:g}", "", *map(str, counts), str(sum(counts))])
        lines.append([named(row), row.label, _kept(row), *(_score(row, key, 1, intervals) for key in (*keys, MEAN))])
    return ["Model", "Method", "Kept tokens", *keys, MEAN], lines


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table, the first ``words`` columns aligned left and the others right."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *lines])


def text_of(tables: Iterable[Cells], remarks: Sequence[str], name: str) -> str:
    """Tables and their remarks as "markdown", or as "latex": tabulars of the booktabs package, remarks as comments."""
    if name == "markdown":
        return "\n".join(markdown(*table, WORDS) for table in tables) + "".join(f"\n{remark}\n" for remark in remarks)
    text = []
    for header, lines in tables:
        body = [
            " & ".join(cell.translate(str.maketrans(_LATEX)) for cell in line) + r" \\" for line in [header, *lines]
        ]
        text += [r"\begin{tabular}{lll" + "r" * (len(header) - WORDS) + "}", r"\toprule", body[0], r"\midrule"]
        text += [*body[1:], r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*text, *(f"% {remark}" for remark in remarks)]) + "\n"


def _tables(rows: Sequence[Row], intervals: bool, published: str) -> list[Cells]:
    """The table, and that of the filter where there is one."""
    filtered = [filtered_cells(rows, intervals)] if any(row.filtered for row in rows) else []
    return [cells(rows, intervals, published), *filtered]


def table_html(rows: Sequence[Row], remarks: Sequence[str], intervals: bool, whole: bool = False) -> str:
    """The table (and that of the filter) and its remarks as a fragment of HTML, or with ``whole`` as a page."""
    table, *filtered = _tables(rows, intervals, " (published)")
    best = best_of_columns(rows)
    bold = [[name in best[row] for name in table[0]] for row in rows]
    tables = [_shown_cells(table, bold, [row.published for row in rows]), *map(_shown_cells, filtered)]
    return page.render("table.html.jinja", tables=tables, remarks=remarks, whole=whole)


def _shown_cells(
    table: Cells, bold: Sequence[Sequence[bool]] | None = None, published: Sequence[bool] | None = None
) -> dict[str, Any]:
    """A table for the template, without its empty columns, for which a screen has no room; intervals below scores."""
    header, lines = table
    shown = [place for place in range(len(header)) if place < WORDS or any(line[place] != MISSING for line in lines)]
    rows = []
    for number, line in enumerate(lines):
        texts = [(*line[place].partition(" [")[::2], bool(bold) and bold[number][place]) for place in shown]
        rows.append({"cells": texts, "published": bool(published) and published[number]})
    return {"header": [header[place] for place in shown], "rows": rows}


def best_is_marked(rows: Sequence[Row]) -> list[str]:
    """The remark on what `table_html` prints bold, if anything."""
    return [BEST] if best_of_columns(rows) else []


def _csv(rows: Sequence[Row]) -> str:
    lines, keys = [], [column.key for column in _columns(rows)]
    filtered = any(row.filtered for row in rows)
    for row in rows:
        per_layer = None if row.kept_per_layer is None else " ".join(map(str, row.kept_per_layer))
        line = {name: getattr(row, name) for name in ("model", "method", "ratio", "layer", "source")}
        line |= _budget(row) | {"kept_tokens_per_layer": per_layer} | {key: row.scores.get(key) for key in keys}
        line |= {"mean_relative_percent": row.relative, "average_rank": row.rank}
        line |= {f"{part}_ms": row.milliseconds(part) for part in TIMES}
        for key in (*keys, MEAN):
            names = ("low", "high", "p_unpruned", "p_random", "share_low", "share_high")
            values = (*_evidence_of(row, key), *row.share_interval(key))
            line |= {f"{key}_{name}": value for name, value in zip(names, values, strict=True)}
        if filtered:
            line |= _filtered_of(row.filtered, keys)
        line |= {f"{key}_seed_std": (row.seed_spread or {}).get(key) for key in keys}
        lines.append(line | {"notes": "; ".join(row.notes)})
    return csv_text(list(lines[0]), [line.values() for line in lines]) if lines else ""


def _filtered_of(row: Row | None, keys: Sequence[str]) -> dict[str, float | None]:
    """Of a row's filtered scores: each with its interval and p against Random, and the number of questions."""
    line: dict[str, float | None] = {}
    for key in (*keys, MEAN):
        low, high, _, p = (None,) * 4 if row is None else _evidence_of(row, key)
        found = {"": row and row.score(key), "_low": low, "_high": high, "_p_random": p}
        line |= {f"{key}_filtered{name}": value for name, value in found.items()}
    return line | {f"{key}_filtered_questions": row and row.questions.get(key) for key in keys}


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV table, with scores and intervals, for figures that need no more; a `ValueError` for others."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [_read_row(line) for line in csv.DictReader(file)]
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from None


def _read_row(line: Mapping[str, str]) -> Row:
    numbers = {name: float(line[name]) for name in line if name not in WORDS_OF_CSV and line[name]}
    keys = [key for name in line if (key := name.removesuffix("_seed_std")) != name and key in numbers]
    spans, shares = (
        {
            key: (numbers[low], numbers[f"{key}{kind}_high"])
            for key in (*keys, MEAN)
            if (low := f"{key}{kind}_low") in numbers
        }
        for kind in ("", "_share")
    )
    return Row(
        model=line["model"],
        method=line["method"],
        ratio=numbers.get("ratio"),
        layer=int(numbers["layer"]) if "layer" in numbers else None,
        scores={key: numbers[key] for key in keys},
        source=line["source"],
        notes=tuple(filter(None, line["notes"].split("; "))),
        evidence=Evidence(spans, {}, {}, shares=shares),
    )


def _json(rows: Sequence[Row], remarks: Sequence[str]) -> str:
    asked = dict.fromkeys(column for row in rows for run in row.runs for column in columns_of(run.tasks))
    columns = [{"key": column.key, "tasks": column.tasks, "metric": column.metric} for column in asked or BENCHMARKS]
    names = ("model", "method", "ratio", "layer", "source", "notes", "visual_tokens")
    content = [
        {name: getattr(row, name) for name in names}
        | _budget(row)
        | {f"{part}_ms": row.milliseconds(part) for part in TIMES}
        | {"answer_ms": row.answer_milliseconds, "scores": row.scores, "mean_relative_percent": row.relative}
        | {"average_rank": row.rank, "seed_spread": row.seed_spread, "evidence": _evidence_dict(row)}
        | {"filtered": row.filtered and _filtered_dict(row.filtered)}
        for row in rows
    ]
    return _dumped({"columns": columns, "rows": content, "remarks": remarks})


def _filtered_dict(row: Row) -> dict[str, Any]:
    scores = {"questions": row.questions, "scores": row.scores, "mean_percent": row.relative}
    return scores | {"evidence": _evidence_dict(row)}


def _evidence_dict(row: Row) -> dict[str, Any] | None:
    return row.evidence and asdict(row.evidence)


def _dumped(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _columns(rows: Sequence[Row]) -> Sequence[Benchmark]:
    return shown_columns({key for row in rows for key in row.scores})


def _budget(row: Row) -> dict[str, Any]:
    kept = (row.kept_tokens, row.total_tokens, row.kept_per_layer)
    return dict(zip(BUDGET, (*kept, row.flops_ratio("literature"), row.flops_ratio("exact")), strict=True))


def _evidence_of(row: Row, key: str) -> list[float | None]:
    """Low, high, and p against unpruned and against Random."""
    if row.evidence is None:
        return [None] * 4
    tests = [found.get(key) for found in (row.evidence.unpruned, row.evidence.random)]
    return [*row.interval(key), *(None if test is None else test.p for test in tests)]


def _score(row: Row, key: str, digits: int, intervals: bool, unit: str = "") -> str:
    """A score, with ``intervals`` also its interval and a mark for each test that finds a difference."""
    text = _shown(row.score(key), digits, unit)
    low, high, *tests = _evidence_of(row, key)
    if low is None or not intervals:
        return text
    marks = [mark for mark, p in zip(_DAGGER + _DOUBLE_DAGGER, tests, strict=True) if p is not None and p < SIGNIFICANT]
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]{''.join(marks)}"


def _kept(row: Row) -> str:
    kept, total = row.kept_tokens, row.total_tokens
    return MISSING if kept is None else f"{kept:.4g} / {total:.4g} ({100 * kept / total:.1f} %)"


def _shown(value: float | None, digits: int, unit: str = "") -> str:
    return MISSING if value is None else f"{value:.{digits}f}{unit}"
