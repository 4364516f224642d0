"""The table: one row a pruning configuration, one column a benchmark, read from the result folders of runs.

``python -m llava.eval.table RUN... [--format markdown|csv|json] [--output FILE]``
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PUBLISHED_FILE = Path(__file__).with_name("published.json")
MISSING = "\N{EN DASH}"
FLOPS = "Prefill FLOPs / unpruned"
BUDGET = (
    "kept_tokens_mean",
    "total_tokens_mean",
    "kept_tokens_per_layer",
    "flops_ratio_literature",
    "flops_ratio_exact",
)
"""Columns of the CSV table and keys of the JSON table; tokens a layer stand in one cell, separated by spaces."""


@dataclass(frozen=True)
class Column:
    """A benchmark and the metric that the papers print of it.

    Attributes
    ----------
    key : str
        Short name, as in the papers.
    tasks : tuple of str
        lmms-eval's names for it, embedded counterparts included.
    metric : str
    scale : float
        What the framework's value is multiplied with to be read like the papers' (percent, CIDEr, MME's points).
    digits : int
        Decimals shown.
    """

    key: str
    tasks: tuple[str, ...]
    metric: str
    scale: float = 100.0
    digits: int = 2


def _column(key: str, task: str, metric: str, scale: float = 100.0, digits: int = 2) -> Column:
    return Column(key, (task, f"{task}_static", f"mini_{task}"), metric, scale, digits)


COLUMNS = (
    _column("COCO", "coco2017_cap_val", "coco_CIDEr", 1.0),
    _column("Flickr30k", "flickr30k_test", "flickr_CIDEr", 1.0),
    _column("GQA", "gqa", "exact_match"),
    _column("MMB", "mmbench_en_dev", "gpt_eval_score", 1.0),
    _column("MME-P", "mme", "mme_perception_score", 1.0, 0),
    _column("MMMU", "mmmu_val", "mmmu_acc"),
    _column("NoCaps", "nocaps_val", "nocaps_CIDEr", 1.0),
    _column("OKVQA", "ok_vqa_val2014", "exact_match"),
    _column("POPE", "pope", "pope_f1_score"),
    _column("SQA", "scienceqa_img", "exact_match"),
    _column("SEED-I", "seedbench", "seed_image"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes
    ----------
    model : str
    method : str
        "unpruned", "grey picture" (unpruned, and shown nothing), or the method with the options that were set.
    ratio : float, or None
        Asked-for kept ratio; 1 for unpruned, None where the method's options say how much is kept.
    layer : int, or None
        Decoder layer at whose input tokens are dropped; None for several.
    scores : dict
        Column key -> score on the papers' scale; what is missing was not measured.
    source : str
        "measured", or where a published figure stands.
    notes : tuple of str
        What a reader must know: mini suite, untrained model, a limit on the documents, failed tasks.
    visual_tokens : dict, or None
        What was measured: minimum, mean and maximum of total and kept visual tokens an image, their mean in each
        decoder layer, and the prefill's FLOPs relative to unpruned. Older results have the first only.
    relative : float, or None
        Mean over the columns of score / unpruned score, of the same model and source, in percent.
    """

    model: str
    method: str
    ratio: float | None
    scores: Mapping[str, float]
    layer: int | None = 0
    source: str = "measured"
    notes: tuple[str, ...] = ()
    visual_tokens: Mapping[str, Any] | None = None
    relative: float | None = None

    @property
    def published(self) -> bool:
        return self.source != "measured"

    @property
    def label(self) -> str:
        """Method, ratio and place, for a person."""
        if self.method in ("unpruned", "grey picture"):
            return self.method
        ratio = "" if self.ratio is None else f" {self.ratio:g}"
        return f"{self.method}{ratio}" + (f", layer {self.layer}" if self.layer else "")

    @property
    def total_tokens(self) -> float | None:
        """Mean over the images of the visual tokens that an unpruned model sees."""
        return self.visual_tokens["total"]["mean"] if self.visual_tokens else None

    @property
    def kept_tokens(self) -> float | None:
        """Mean over the images and the decoder layers of the visual tokens present."""
        if not self.visual_tokens:
            return None
        # Older results say what is left at the end of the decoder, which is another figure when it drops tokens.
        return None if self.layer != 0 and self.kept_per_layer is None else self.visual_tokens["kept"]["mean"]

    @property
    def kept_per_layer(self) -> Sequence[float] | None:
        """Mean over the images of the visual tokens present in each decoder layer."""
        return (self.visual_tokens or {}).get("per_layer")

    def flops_ratio(self, convention: str) -> float | None:
        """The prefill's FLOPs relative to unpruned, by convention: "literature" or "exact" (see `llava.eval.flops`)."""
        ratios = (self.visual_tokens or {}).get("flops_ratio")
        return ratios[convention] if ratios else None


@dataclass(frozen=True)
class Table:
    """Rows in reading order, and the remarks that belong under them."""

    rows: tuple[Row, ...]
    remarks: tuple[str, ...]

    def render(self, name: str) -> str:
        """The table as "markdown", "csv" or "json"; a `ValueError` for anything else."""
        if name not in FORMATS:
            raise ValueError(f"no table format {name!r}; there are {', '.join(FORMATS)}")
        return FORMATS[name](self)


def load_runs(folders: Iterable[Path | str]) -> list[Row]:
    """Read result folders: a whole run's, or that of one model under one pruning configuration.

    Raises
    ------
    ValueError
        If a folder holds no results.
    """
    rows = []
    for folder in folders:
        path = Path(folder) / "results.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder} is no result folder: it has no results.json") from None
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        rows += [_row(run) for run in content.get("runs", [content])]
    return rows


def published_rows(model: str) -> list[Row]:
    """Published figures of a checkpoint, by the last part of its name; none for most models."""
    entries = json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))
    name = _short(model)
    return [
        Row(name, entry["method"], entry["ratio"], entry["scores"], source=entry["source"])
        for entry in entries
        if entry["model"] == name
    ]


def build_table(rows: Sequence[Row]) -> Table:
    """Order rows by model, put published figures beside real checkpoints, and add the means relative to unpruned."""
    ordered: list[Row] = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        real = not any("mini suite" in row.notes for row in own)
        ordered += own + (published_rows(model) if real else [])
    ordered = [replace(row, relative=_relative(row, _unpruned(row, ordered))) for row in ordered]
    return Table(tuple(ordered), tuple(_remarks(ordered)))


def _row(run: Mapping[str, Any]) -> Row:
    pruning = run["pruning"]
    notes = []
    if run["suite"] == "mini":
        notes.append("mini suite")
    if not run["trained"]:
        notes.append("untrained")
    if run["limit"]:
        notes.append(f"first {run['limit']} documents a task")
    notes += [f"{task} failed" for task in run["failed"]]
    return Row(
        model=_short(run["model"]),
        method=_method(run),
        ratio=1.0 if pruning is None else pruning["ratio"],
        layer=0 if pruning is None else pruning["layer"],
        scores=_scores(run["tasks"]),
        notes=tuple(notes),
        visual_tokens=run["visual_tokens"],
    )


def _method(run: Mapping[str, Any]) -> str:
    if run.get("grey"):
        return "grey picture"
    return "unpruned" if run["pruning"] is None else run["pruning"]["method"] + _options(run["pruning"])


def _options(pruning: Mapping[str, Any]) -> str:
    """The options by which rows of one method differ; a default is not worth the space."""
    options = {name: value for name, value in pruning["options"].items() if name in pruning.get("set_options", ())}
    return f" ({', '.join(f'{name} {value}' for name, value in options.items())})" if options else ""


def _scores(tasks: Mapping[str, Any]) -> dict[str, float]:
    scores = {}
    for column in COLUMNS:
        for task in column.tasks:
            if task in tasks and column.metric in tasks[task]["metrics"]:
                scores[column.key] = tasks[task]["metrics"][column.metric] * column.scale
    return scores


def _unpruned(row: Row, rows: Sequence[Row]) -> Row | None:
    same = (other for other in rows if (other.model, other.source) == (row.model, row.source))
    return next((other for other in same if other.method == "unpruned"), None)


def _relative(row: Row, unpruned: Row | None) -> float | None:
    if unpruned is None:
        return None
    shares = [row.scores[key] / full for key, full in unpruned.scores.items() if full and key in row.scores]
    return 100 * sum(shares) / len(shares) if shares else None


def _remarks(rows: Sequence[Row]) -> list[str]:
    remarks = []
    if any("mini suite" in row.notes for row in rows):
        remarks.append(
            "Mini suite: small rendered data sets in the real schemas, not the published benchmarks. Its numbers "
            "compare with each other only."
        )
    if any("untrained" in row.notes for row in rows):
        remarks.append(
            "Untrained: the model's weights are random. The scores show that the way through works, no more."
        )
    remarks += sorted({f"{_name(row)}: {note}." for row in rows for note in row.notes if note.endswith("failed")})
    limits = sorted({note for row in rows for note in row.notes if note.startswith("first ")})
    remarks += [f"Limited: {limit}." for limit in limits]
    remarks += sorted({f"Published: {row.source}." for row in rows if row.published})
    if any(row.flops_ratio("exact") is not None for row in rows):
        remarks.append(
            "FLOPs: of the prefill, two a multiply-accumulate, vision tower and projector included; choosing the "
            "tokens is not counted. In the papers' convention, which counts the decoder alone: flops_ratio_literature "
            "in the CSV and JSON tables."
        )
    if any(row.relative is not None for row in rows):
        remarks.append(
            "Mean: score relative to the same model unpruned, averaged over the columns that both rows have."
        )
    return remarks


def _markdown(table: Table) -> str:
    header = ["Model", "Method", "Kept tokens", FLOPS, *(column.key for column in COLUMNS), "Mean"]
    lines = [header, ["---", "---", "---", "---:", *("---:" for _ in COLUMNS), "---:"]]
    for row in table.rows:
        method = f"{row.label} *(published)*" if row.published else row.label
        scores = [_shown(row.scores.get(column.key), column.digits) for column in COLUMNS]
        lines.append([_name(row), method, _kept(row), _flops(row), *scores, _shown(row.relative, 1, " %")])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "".join(f"\n{remark}\n" for remark in table.remarks)


def _csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["model", "method", "ratio", "layer", "source", *BUDGET]
        + [column.key for column in COLUMNS]
        + ["mean_relative_percent", "notes"]
    )
    for row in table.rows:
        per_layer = None if row.kept_per_layer is None else " ".join(str(tokens) for tokens in row.kept_per_layer)
        budget = {**_budget(row), "kept_tokens_per_layer": per_layer}
        writer.writerow(
            [row.model, row.method, row.ratio, row.layer, row.source, *budget.values()]
            + [row.scores.get(column.key) for column in COLUMNS]
            + [row.relative, "; ".join(row.notes)]
        )
    return text.getvalue()


def _json(table: Table) -> str:
    columns = [{"key": column.key, "tasks": column.tasks, "metric": column.metric} for column in COLUMNS]
    rows = [
        {
            "model": row.model,
            "method": row.method,
            "ratio": row.ratio,
            "layer": row.layer,
            "source": row.source,
            "notes": row.notes,
            "visual_tokens": row.visual_tokens,
            **_budget(row),
            "scores": row.scores,
            "mean_relative_percent": row.relative,
        }
        for row in table.rows
    ]
    return json.dumps({"columns": columns, "rows": rows, "remarks": table.remarks}, indent=2, ensure_ascii=False) + "\n"


FORMATS = {"markdown": _markdown, "csv": _csv, "json": _json}


def _name(row: Row) -> str:
    return f"{row.model} (untrained)" if "untrained" in row.notes else row.model


def _budget(row: Row) -> dict[str, Any]:
    values = (
        row.kept_tokens,
        row.total_tokens,
        row.kept_per_layer,
        row.flops_ratio("literature"),
        row.flops_ratio("exact"),
    )
    return dict(zip(BUDGET, values, strict=True))


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


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with one sentence when a folder cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.table", description="The table of finished runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="result folder of a run, or of one of its models")
    parser.add_argument("--format", choices=tuple(FORMATS), default="markdown")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    found = parser.parse_args(arguments)
    try:
        text = build_table(load_runs(found.runs)).render(found.format)
    except ValueError as error:
        print(f"llava.eval.table: {error}", file=sys.stderr)
        return 2
    if found.output is None:
        print(text, end="")
    else:
        found.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
