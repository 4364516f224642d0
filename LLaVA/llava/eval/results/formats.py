"""How a table is written down: Markdown, CSV, JSON, LaTeX, HTML."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava.benchmarks import BENCHMARKS, Benchmark, columns_of, shown_columns
from llava.eval.results.evidence import Evidence
from llava.eval.results.rows import MEAN, Row, best_of_columns
from llava.files import csv_text

MISSING = "\N{EN DASH}"
FLOPS = "Prefill FLOPs / unpruned"
TIMES = ("selection", "prefill")
SIGNIFICANT = 0.05
WORDS = 3
"""Columns of words, at the left."""
BEST = "Bold: the best of the rows of one model that keep equally many tokens (within a tenth)."
BUDGET = (
    "kept_tokens_mean",
    "total_tokens_mean",
    "kept_tokens_per_layer",
    "flops_ratio_literature",
    "flops_ratio_exact",
)
"""Columns of the CSV table and keys of the JSON table; tokens per layer stand in one cell, separated by spaces."""
WORDS_OF_CSV = ("model", "method", "source", "kept_tokens_per_layer", "notes")
_DAGGER, _DOUBLE_DAGGER = "\N{DAGGER}", "\N{DOUBLE DAGGER}"
_LATEX = {character: rf"\{character}" for character in "%_&#"} | {
    MISSING: "--",
    _DAGGER: r"\textsuperscript{\dag}",
    _DOUBLE_DAGGER: r"\textsuperscript{\ddag}",
}
Cells = tuple[list[str], list[list[str]]]
"""A table for a person: its header, and its lines as text."""
_STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:1rem}"
    ".wide{overflow-x:auto}table{border-collapse:collapse}th,td{padding:.3rem .6rem;white-space:nowrap;"
    "text-align:right;border-bottom:1px solid #8886}th:nth-child(-n+3),td:nth-child(-n+3){text-align:left}"
    ".published{font-style:italic}"
)


def named(row: Row) -> str:
    """The model, for a person."""
    return f"{row.model} (untrained)" if "untrained" in row.notes else row.model


def cells(rows: Sequence[Row], intervals: bool, published: str = "") -> Cells:
    """The table for a person: its header, and its lines as text.

    ``published`` stands after the method of rows that are published figures.
    """
    times = [part for part in TIMES if any(row.milliseconds(part) is not None for row in rows)]
    header = ["Model", "Method", "Kept tokens", FLOPS, *(f"{part.capitalize()} ms" for part in times)]
    columns = _columns(rows)
    header += [*(column.key for column in columns), MEAN, "Rank"]
    lines = []
    for row in rows:
        flops = row.flops_ratio("exact")
        line = [named(row), row.label + published * row.published, _kept(row)]
        line += [_shown(None if flops is None else 100 * flops, 1, " %")]
        line += [_shown(row.milliseconds(part), 2) for part in times]
        for key, digits, unit in [*((column.key, column.digits, "") for column in columns), (MEAN, 1, " %")]:
            line.append(_shown(row.score(key), digits, unit) + (_beside(row, key, digits) if intervals else ""))
        lines.append([*line, _shown(row.rank, 2)])
    return header, lines


def filtered_cells(rows: Sequence[Row], intervals: bool) -> Cells:
    """The same of `Row.filtered`, at each ratio below the numbers of questions."""
    filtered = [row.filtered for row in rows if row.filtered]
    columns = [column for column in BENCHMARKS if any(column.key in row.questions for row in filtered)]
    header = ["Model", "Method", "Kept tokens", *(column.key for column in columns), "Mean"]
    lines, before = [], None
    for row in filtered:
        if (row.model, row.ratio) != before:
            before = row.model, row.ratio
            counts = [row.questions.get(column.key, 0) for column in columns]
            lines.append([named(row), f"questions at {row.ratio:g}", "", *map(str, counts), str(sum(counts))])
        line = [named(row), row.label, _kept(row)]
        for key in (*(column.key for column in columns), MEAN):
            line.append(_shown(row.score(key), 1) + (_beside(row, key, 1) if intervals else ""))
        lines.append(line)
    return header, lines


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


def _markdown(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    return text_of(_tables(rows, intervals, " *(published)*"), remarks, "markdown")


def _latex(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    return text_of(_tables(rows, intervals, " (published)"), remarks, "latex")


def _tables(rows: Sequence[Row], intervals: bool, published: str) -> list[Cells]:
    """The table, and that of the filter where there is one."""
    filtered = [filtered_cells(rows, intervals)] if any(row.filtered for row in rows) else []
    return [cells(rows, intervals, published), *filtered]


def table_html(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    """The table (and that of the filter) and its remarks as a fragment of HTML."""
    (header, lines), *filtered = _tables(rows, intervals, " (published)")
    best = best_of_columns(rows)
    bold = [[name in best[number] for name in header] for number in range(len(rows))]
    text = html_table(header, lines, bold, [row.published for row in rows])
    return text + "".join(html_table(*table) for table in filtered) + _paragraphs(remarks)


def html_table(
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    bold: Sequence[Sequence[bool]] = (),
    published: Sequence[bool] = (),
) -> str:
    """A table of HTML without its empty columns: those that no row was asked take a place that a screen has not."""
    shown = [place for place in range(len(header)) if place < WORDS or any(line[place] != MISSING for line in lines)]
    head = "".join(f"<th>{html.escape(header[place])}</th>" for place in shown)
    text = f'<table class="results">\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
    for number, line in enumerate(lines):
        texts = [_two_lines(line[place], bool(bold) and bold[number][place]) for place in shown]
        mark = ' class="published"' if published and published[number] else ""
        text += f"<tr{mark}>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>\n"
    return text + "</tbody>\n</table>\n"


def _paragraphs(remarks: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(remark)}</p>\n" for remark in remarks)


def best_is_marked(rows: Sequence[Row]) -> list[str]:
    """The remark that says so, where `table_html` marks anything."""
    return [BEST] if any(best_of_columns(rows).values()) else []


def _two_lines(cell: str, best: bool) -> str:
    """The interval below the score: eleven of them side by side fit no screen."""
    score, bracket, interval = html.escape(cell).partition(" [")
    return (f"<strong>{score}</strong>" if best else score) + (f"<br><small>[{interval}</small>" if bracket else "")


def _html(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    """A page of its own."""
    return html_page(table_html(rows, [*remarks, *best_is_marked(rows)], intervals))


def html_page(fragment: str) -> str:
    """A page around a table."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Results</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<div class="wide">\n{fragment}</div>\n</body>\n</html>\n'
    )


def _csv(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    lines, keys = [], [column.key for column in _columns(rows)]
    filtered = any(row.filtered for row in rows)
    for row in rows:
        per_layer = None if row.kept_per_layer is None else " ".join(map(str, row.kept_per_layer))
        line = {name: getattr(row, name) for name in ("model", "method", "ratio", "layer", "source")}
        line |= _budget(row) | {"kept_tokens_per_layer": per_layer} | {key: row.scores.get(key) for key in keys}
        line |= {"mean_relative_percent": row.relative, "average_rank": row.rank}
        line |= {f"{part}_ms": row.milliseconds(part) for part in TIMES}
        for key in (*keys, MEAN):
            names = (f"{key}_low", f"{key}_high", f"{key}_p_unpruned", f"{key}_p_random")
            line |= dict(zip(names, _evidence_of(row, key), strict=True))
            line |= dict(zip((f"{key}_share_low", f"{key}_share_high"), row.share_interval(key), strict=True))
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


def _json(rows: Sequence[Row], remarks: Sequence[str], intervals: bool) -> str:
    asked = dict.fromkeys(column for row in rows for run in row.runs for column in columns_of(run.tasks))
    columns = [{"key": column.key, "tasks": column.tasks, "metric": column.metric} for column in asked or BENCHMARKS]
    names = ("model", "method", "ratio", "layer", "source", "notes", "visual_tokens")
    content = [
        {name: getattr(row, name) for name in names}
        | _budget(row)
        | {f"{part}_ms": row.milliseconds(part) for part in TIMES}
        | {
            "answer_ms": row.answer_milliseconds,
            "scores": row.scores,
            "mean_relative_percent": row.relative,
            "average_rank": row.rank,
            "seed_spread": row.seed_spread,
            "evidence": row.evidence and asdict(row.evidence),
            "filtered": row.filtered
            and {"questions": row.filtered.questions, "scores": row.filtered.scores}
            | {
                "mean_percent": row.filtered.relative,
                "evidence": row.filtered.evidence and asdict(row.filtered.evidence),
            },
        }
        for row in rows
    ]
    return json.dumps({"columns": columns, "rows": content, "remarks": remarks}, indent=2, ensure_ascii=False) + "\n"


FORMATS = {"markdown": _markdown, "csv": _csv, "json": _json, "latex": _latex, "html": _html}


def plain_table(name: str, table: Cells, remarks: Sequence[str]) -> str:
    """Another table than that of scores in one of the `FORMATS`."""
    header, lines = table
    if name == "csv":
        return csv_text(header, lines)
    if name == "json":
        content = {"rows": [dict(zip(header, line, strict=True)) for line in lines], "remarks": remarks}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return html_page(html_table(*table) + _paragraphs(remarks)) if name == "html" else text_of([table], remarks, name)


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


def _beside(row: Row, key: str, digits: int) -> str:
    """The interval, and a mark for each test that finds a difference."""
    low, high, *tests = _evidence_of(row, key)
    if low is None:
        return ""
    marks = [mark for mark, p in zip(_DAGGER + _DOUBLE_DAGGER, tests, strict=True) if p is not None and p < SIGNIFICANT]
    return f" [{low:.{digits}f}, {high:.{digits}f}]{''.join(marks)}"


def _kept(row: Row) -> str:
    kept, total = row.kept_tokens, row.total_tokens
    return MISSING if kept is None else f"{kept:.4g} / {total:.4g} ({100 * kept / total:.1f} %)"


def _shown(value: float | None, digits: int, unit: str = "") -> str:
    return MISSING if value is None else f"{value:.{digits}f}{unit}"
