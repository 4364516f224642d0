"""The report: table, figures and token maps of a set of runs in one HTML file that needs nothing from elsewhere.

``python -m llava.eval.report RUN... --output report.html``
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from llava.command import Parser, find_device
from llava.eval.examples import RULE, Example, find_examples
from llava.eval.figures import (
    FROM_DISTANCES,
    FROM_SCORES,
    add_image_arguments,
    complete_table,
    draw_figures,
)
from llava.eval.page import data_uri, render
from llava.eval.plots.drawing import Drawn
from llava.eval.results.formats import best_is_marked, table_html
from llava.eval.results.rows import UNPRUNED, Row, row_of
from llava.eval.results.runs import described, differences
from llava.eval.results.safe import SAFE
from llava.eval.table import Table, add_arguments, add_filter, add_safe, options_of
from llava.eval.token_page import selection_html
from llava.files import atomic_write, check_writable
from llava.mm_utils import load_image
from llava.pruning import PruningConfig

MOST_MAPS = 6
T = TypeVar("T")


def write_report(
    folders: Sequence[Path | str],
    output: Path,
    *,
    safe: float = SAFE,
    images: int = 16,
    image_folder: Path | None = None,
    image: str | None = None,
    with_model: bool = True,
    synthetic: bool = False,
    device: str = "cpu",
    **options: Any,
) -> list[str]:
    """Write the report of finished runs; returns what it lacks, and why.

    Parameters
    ----------
    folders : sequence of path
    output : Path
    safe : float
        The share of the figure of safe ratios.
    images, image_folder, device
        See `llava.eval.plots.distances.measure`.
    image : str, optional
        The image of the token maps; by default three of the benchmarks' images, with question and answers.
    with_model : bool
        Load the runs' model for distances and token maps.
    synthetic : bool
        Also run the synthetic experiment (a minute).
    **options
        Of `llava.eval.table.build_table`.

    Raises
    ------
    ImportError
        Without the extra "figures".
    OSError
        If the report cannot be written.
    ValueError
        For runs that are not complete, or that cannot be in one table.
    """
    check_writable(output)
    own = Example("Image", "", Path(image).name, "", load_image(image), ()) if image else None
    table = complete_table(folders, intervals=True, **options)
    settings = {"images": images, "folder": image_folder, "device": device, "safe": safe}
    figures, left_out = _figures(table.rows, with_model, synthetic, settings)
    cards: list[dict[str, Any]] = []
    if with_model:
        try:
            cards, missing = _cards(table.rows, own, device)
            left_out += missing
        except (ImportError, OSError, ValueError) as error:
            left_out.append(f"token maps: {error}")
    text = render(
        "report.html.jinja",
        title=f"Visual token pruning: {', '.join(dict.fromkeys(row.model for row in table.rows))}",
        summary=_summary(table.rows),
        table=table_html(table.rows, (), True),
        remarks=[*table.remarks, *best_is_marked(table.rows)],
        table_csv=data_uri(table.render("csv").encode(), "text/csv"),
        table_json=data_uri(table.render("json").encode(), "application/json"),
        figures=[_embedded(figure) for figure in figures],
        cards=cards,
        rule=RULE if any(card["truth"] for card in cards) else "",
        left_out=left_out,
        facts=_made_with(table),
    )
    atomic_write(output, text)
    return left_out


def _figures(
    rows: Sequence[Row], with_model: bool, synthetic: bool, settings: Mapping[str, Any]
) -> tuple[list[Drawn], list[str]]:
    """Every figure of every model that there are data for, and why others are missing."""
    names = (*(FROM_DISTANCES if with_model else ()), *FROM_SCORES)
    measured = [row for row in rows if not row.published]
    models = list(dict.fromkeys(row.model for row in measured))
    drawn, left_out = [], []
    for model in models:
        own = [row for row in measured if row.model == model]
        found, missing = draw_figures(names, own, any_of=True, **settings)
        if len(models) > 1:
            found = [replace(one, name=f"{one.name}-{model}", title=f"{one.title}: {model}") for one in found]
            missing = [f"{model}: {sentence}" for sentence in missing]
        drawn += found
        left_out += missing
    return drawn + (draw_figures(("synthetic",), rows, **settings)[0] if synthetic else []), left_out


def _cards(rows: Sequence[Row], own: Example | None, device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Images, the tokens that each method keeps of them and, for those of a benchmark, the answers.

    The model is that of the first row; ``own`` is shown instead of the benchmarks' images, without answers. Also
    returns which kinds of images there are none of, and why.
    """
    from llava.eval.encoder import Encoder, image_configs, images_of_suite

    rows = [row for row in rows if row.model == rows[0].model and not row.published]
    drawn = at_one_ratio([(row, configs[0]) for row in rows if (configs := image_configs(row))])[:MOST_MAPS]
    if not drawn:
        raise ValueError("none of the runs drops tokens before the decoder by what is in the image alone")
    shown = [row for row in rows if row.method == UNPRUNED][:1] + [row for row, _ in drawn]
    others = [row for row in rows if row.pruned and row.ratio == drawn[0][0].ratio and row not in shown]
    examples, missing = ([own], []) if own else find_examples([*shown, *others])
    if not examples:
        if not rows[0].runs[0].mini:
            raise ValueError("; ".join([*missing, "give an image of your own (--image)"]))
        [first] = next(iter(images_of_suite(1, rows[0].runs[0].group).values()))
        examples = [Example("Image", "", "the first image of the suite", "", first, ())]
    encoder = Encoder.load(rows[0].runs[0].content["model"], device)
    cards = []
    for example in examples:
        kept: dict[str, list[int] | None] = dict.fromkeys(_name(row) for row in shown)
        kept |= {_name(row): encoder.kept_order(example.image, config) for row, config in drawn}
        answers = {_name(row): answer for row, answer in zip([*shown, *others], example.answers, strict=False)}
        maps = selection_html(encoder.views([example.image])[0], kept, example.question, answers)
        card = {name: getattr(example, name) for name in ("kind", "benchmark", "question", "truth")}
        cards.append(card | {"maps": maps, "others": [pair for pair in answers.items() if pair[0] not in kept]})
    return cards, missing


def _name(row: Row) -> str:
    """A row's method, for a map; of several seeds, the first is drawn."""
    return row_of(row.runs[0]).method


def at_one_ratio(named: Sequence[tuple[T, PruningConfig]]) -> list[tuple[T, PruningConfig]]:
    """Those configurations whose kept ratio the most of them have, the smallest such ratio, in their order."""
    counts = Counter(config.ratio for _, config in named)
    chosen = min(counts, key=lambda ratio: (-counts[ratio], ratio), default=None)
    return [(one, config) for one, config in named if config.ratio == chosen]


def _embedded(figure: Drawn) -> dict[str, Any]:
    return {
        "name": figure.name,
        "title": figure.title,
        "caption": figure.caption,
        "png": data_uri(figure.png(), "image/png"),
        "csv": data_uri(figure.csv().encode(), "text/csv"),
        "small": figure.figure.get_figwidth() < 9,
    }


def _summary(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if not row.published]
    methods = sorted({row.family for row in measured if row.pruned})
    samples = max(sum(result.get("samples", 0) for result in row.runs[0].tasks.values()) for row in measured)
    return (
        f"{len(measured)} configurations ({', '.join(methods) or 'unpruned only'}) on "
        f"{len(measured[0].scores)} benchmarks, {samples:,} answers each."
    )


def _made_with(table: Table) -> list[tuple[str, str]]:
    """What all runs have in common, then what differs."""
    runs = [run for row in table.rows for run in row.runs]
    about = []
    for name, key in (("machine", "device"), ("git commit", "git_commit")):
        values = sorted({str(run.manifest[key]) for run in runs if run.manifest.get(key)})
        about += [(name, ", ".join(values))] if values else []
    differ = differences(runs)
    common = {name: value for run in runs for name, value in run.metadata().items() if name not in differ}
    return [*about, *common.items(), *((name, described(values)) for name, values in differ.items())]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("llava.eval.report", __doc__)
    add_arguments(parser)
    add_filter(parser)
    add_safe(parser, SAFE)
    parser.add_output("report.html")
    parser.add_image(required=False, about="the image of the token maps (default: three of the benchmarks')")
    parser.add_argument("--no-model", action="store_true", help="no distances and token maps, which load the model")
    parser.add_argument("--synthetic", action="store_true", help="the synthetic experiment too (a minute)")
    add_image_arguments(parser)
    return parser.run(_write, argv)


def _write(found: argparse.Namespace) -> None:
    own = {name: getattr(found, name) for name in ("safe", "images", "image_folder", "image", "synthetic")}
    own |= {"with_model": not found.no_model, "device": find_device(found.device)}
    left_out = write_report(found.runs, found.output, **options_of(found), **own)
    for sentence in left_out:
        print(f"not in the report: {sentence}")
    print(found.output)


if __name__ == "__main__":
    raise SystemExit(main())
