"""How a table is written down: Markdown, CSV, JSON, LaTeX, HTML."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llava.benchmarks import BENCHMARKS, shown_columns
from llava.eval.results.rows import Row, best_of_columns

MISSING = "\N{EN DASH}"
FLOPS = "Prefill FLOPs / unpruned"
TIMES = ("selection", "prefill")
SIGNIFICANT = 0.05
BEST = "Bold: the best of the rows of one model that keep equally many tokens (within a tenth)."
BUDGET = (
    "kept_tokens_mean",
    "total_tokens_mean",
    "kept_tokens_per_layer",
    "flops_ratio_literature",
    "flops_ratio_exact",
)
"""Columns of the CSV table and keys of the JSON table; tokens a layer stand in one cell, separated by spaces."""
_DAGGER, _DOUBLE_DAGGER = "\N{DAGGER}", "\N{DOUBLE DAGGER}"
_LATEX = str.maketrans(
    {
        "%": r"\%",
        "_": r"\_",
        "&": r"\&",
        "#": r"\#",
        MISSING: "--",
        _DAGGER: r"\textsuperscript{\dag}",
        _DOUBLE_DAGGER: r"\textsuperscript{\ddag}",
    }
)


def named(row: Row) -> str:
    """The model, for a person."""
    return f"{row.model} (untrained)" if "untrained" in row.notes else row.model


def cells(rows: Sequence[Row], intervals: bool) -> tuple[list[str], list[list[str]]]:
    """The table for a person: its header, and its lines as text; the first three columns are words."""
    times = [part for part in TIMES if any(row.milliseconds(part) is not None for row in rows)]
    header = ["Model", "Method", "Kept tokens", FLOPS, *(f"{part.capitalize()} ms" for part in times)]
    columns = shown_columns({key for row in rows for key in row.scores})
    header += [*(column.key for column in columns), "Mean", "Rank"]
    lines = []
    for row in rows:
        measured = [_shown(row.milliseconds(part), 2) for part in times]
        scores = [
            _shown(row.scores.get(column.key), column.digits) + _beside(row, column.key, column.digits, intervals)
            for column in columns
        ]
        relative = _shown(row.relative, 1, " %") + _beside(row, "Mean", 1, intervals)
        lines.append(
            [named(row), row.label, _kept(row), _flops(row), *measured, *scores, relative, _shown(row.rank, 2)]
        )
    return header, lines


def _markdown(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    header, lines = cells(rows, intervals)
    for row, line in zip(rows, lines, strict=True):
        line[1] += " *(published)*" if row.published else ""
    rule = ["---"] * 3 + ["---:"] * (len(header) - 3)
    text = "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *lines])
    return text + "".join(f"\n{remark}\n" for remark in remarks)


def _latex(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    """A tabular of the booktabs package, its remarks as comments."""
    header, lines = cells(rows, intervals)
    for row, line in zip(rows, lines, strict=True):
        line[1] += " (published)" if row.published else ""
    body = [" & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in [header, *lines]]
    text = [r"\begin{tabular}{lll" + "r" * (len(header) - 3) + "}", r"\toprule", body[0], r"\midrule", *body[1:]]
    text += [r"\bottomrule", r"\end{tabular}", *(f"% {remark}" for remark in remarks)]
    return "\n".join(text) + "\n"


def table_html(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    """The table and its remarks as a fragment of HTML."""
    header, lines = cells(rows, intervals)
    # Benchmarks that no row was asked take a place that a screen does not have.
    shown = [place for place in range(len(header)) if place < 3 or any(line[place] != MISSING for line in lines)]
    head = "".join(f"<th>{html.escape(header[place])}</th>" for place in shown)
    best = best_of_columns(rows)
    body = []
    for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
        mark = ' class="published"' if row.published else ""
        line[1] += " (published)" if row.published else ""
        texts = [_two_lines(line[place], header[place] in best[number]) for place in shown]
        body.append(f"<tr{mark}>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    text = f'<table class="results">\n<thead><tr>{head}</tr></thead>\n<tbody>\n' + "\n".join(body)
    text += "\n</tbody>\n</table>\n"
    return text + "".join(f"<p>{html.escape(remark)}</p>\n" for remark in remarks)


def best_is_marked(rows: Sequence[Row]) -> list[str]:
    """The remark that says so, where `table_html` marks anything."""
    return [BEST] if any(best_of_columns(rows).values()) else []


def _two_lines(cell: str, best: bool) -> str:
    """The interval below the score: eleven of them side by side fit no screen."""
    score, bracket, interval = html.escape(cell).partition(" [")
    return (f"<strong>{score}</strong>" if best else score) + (f"<br><small>[{interval}</small>" if bracket else "")


def _html(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    """A page of its own."""
    style = (
        ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:1rem}"
        ".wide{overflow-x:auto}table{border-collapse:collapse}th,td{padding:.3rem .6rem;white-space:nowrap;"
        "text-align:right;border-bottom:1px solid #8886}th:nth-child(-n+3),td:nth-child(-n+3){text-align:left}"
        ".published{font-style:italic}"
    )
    fragment = table_html(rows, [*remarks, *best_is_marked(rows)], intervals)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Results</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<div class="wide">\n{fragment}</div>\n</body>\n</html>\n'
    )


def _csv(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    text = io.StringIO()
    keys = [column.key for column in shown_columns({key for row in rows for key in row.scores})]
    spread = [f"{key}_{what}" for key in (*keys, "Mean") for what in ("low", "high", "p_unpruned", "p_random")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["model", "method", "ratio", "layer", "source", *BUDGET, *keys, "mean_relative_percent", "average_rank"]
        + [f"{part}_ms" for part in TIMES]
        + [*spread, *(f"{key}_seed_std" for key in keys), "notes"]
    )
    for row in rows:
        per_layer = None if row.kept_per_layer is None else " ".join(str(tokens) for tokens in row.kept_per_layer)
        budget = {**_budget(row), "kept_tokens_per_layer": per_layer}
        found = [value for key in (*keys, "Mean") for value in _evidence_of(row, key)]
        writer.writerow(
            [row.model, row.method, row.ratio, row.layer, row.source, *budget.values()]
            + [row.scores.get(key) for key in keys]
            + [row.relative, row.rank, *(row.milliseconds(part) for part in TIMES), *found]
            + [(row.seed_spread or {}).get(key) for key in keys]
            + ["; ".join(row.notes)]
        )
    return text.getvalue()


def _json(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    columns = [{"key": column.key, "tasks": column.tasks, "metric": column.metric} for column in BENCHMARKS]
    content = [
        {
            "model": row.model,
            "method": row.method,
            "ratio": row.ratio,
            "layer": row.layer,
            "source": row.source,
            "notes": row.notes,
            "visual_tokens": row.visual_tokens,
            **_budget(row),
            **{f"{part}_ms": row.milliseconds(part) for part in TIMES},
            "answer_ms": row.answer_milliseconds,
            "scores": row.scores,
            "mean_relative_percent": row.relative,
            "average_rank": row.rank,
            "seed_spread": row.seed_spread,
            "evidence": None if row.evidence is None else asdict(row.evidence),
        }
        for row in rows
    ]
    return json.dumps({"columns": columns, "rows": content, "remarks": remarks}, indent=2, ensure_ascii=False) + "\n"


FORMATS = {"markdown": _markdown, "csv": _csv, "json": _json, "latex": _latex, "html": _html}


def _budget(row: Row) -> dict[str, Any]:
    values = (
        row.kept_tokens,
        row.total_tokens,
        row.kept_per_layer,
        row.flops_ratio("literature"),
        row.flops_ratio("exact"),
    )
    return dict(zip(BUDGET, values, strict=True))


def _evidence_of(row: Row, key: str) -> list[float | None]:
    """Low, high, and p against unpruned and against Random."""
    if row.evidence is None:
        return [None] * 4
    low, high = row.evidence.intervals.get(key, (None, None))
    tests = [found.get(key) for found in (row.evidence.unpruned, row.evidence.random)]
    return [low, high, *(None if test is None else test.p for test in tests)]


def _beside(row: Row, key: str, digits: int, intervals: bool) -> str:
    """The interval, and a mark for each test that finds a difference."""
    low, high, unpruned, random = _evidence_of(row, key)
    if not intervals or low is None:
        return ""
    tests = ((_DAGGER, unpruned), (_DOUBLE_DAGGER, random))
    marks = [mark for mark, p in tests if p is not None and p < SIGNIFICANT]
    return f" [{low:.{digits}f}, {high:.{digits}f}]{''.join(marks)}"


def _kept(row: Row) -> str:
    kept, total = row.kept_tokens, row.total_tokens
    if kept is None:
        return MISSING
    return f"{kept:.4g} / {total:.4g} ({100 * kept / total:.1f} %)"


def _flops(row: Row) -> str:
    ratio = row.flops_ratio("exact")
    return _shown(None if ratio is None else 100 * ratio, 1, " %")


def _shown(value: float | None, digits: int, unit: str = "") -> str:
    return MISSING if value is None else f"{value:.{digits}f}{unit}"
