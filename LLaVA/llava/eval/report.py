"""The report: table, figures and token maps of a set of runs in one HTML file that needs nothing from elsewhere.

``python -m llava.eval.report RUN... --output report.html``
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from llava.command import Parser, find_device
from llava.eval.examples import RULE, Example, find_examples
from llava.eval.figures import (
    FROM_DISTANCES,
    FROM_SCORES,
    add_picture_arguments,
    check_complete,
    draw_figures,
)
from llava.eval.plots.drawing import Drawn
from llava.eval.results.formats import best_is_marked, table_html
from llava.eval.results.rows import UNPRUNED, Row, row_of
from llava.eval.results.runs import differences, unfinished
from llava.eval.table import Table, add_arguments, build_table, load_runs
from llava.eval.token_page import SCRIPT, STYLE, data_uri, selection_html
from llava.files import atomic_write, check_writable
from llava.mm_utils import load_image
from llava.pruning import PruningConfig

TEMPLATE = "report.html.jinja"
MOST_MAPS = 6
FIRST_CAPTIONED = "the first image of the suite's captions"
T = TypeVar("T")


def write_report(
    folders: Sequence[Path | str],
    output: Path,
    *,
    folded: bool = False,
    allow_mixed: bool = False,
    seed: int = 0,
    draws: int = 2000,
    pictures: int = 16,
    picture_folder: Path | None = None,
    image: str | None = None,
    with_model: bool = True,
    synthetic: bool = False,
    device: str = "cpu",
) -> list[str]:
    """Write the report of finished runs.

    Parameters
    ----------
    folders : sequence of path
    output : Path
    folded, allow_mixed, seed, draws
        See `table.build_table`.
    pictures, picture_folder, device
        See `llava.eval.plots.distances.measure`.
    image : str, optional
        The image of the token maps; by default three of the benchmarks', with a question and what was answered.
    with_model : bool
        Load the runs' model for distances and token maps.
    synthetic : bool
        Run the synthetic experiment too (a minute).

    Returns
    -------
    list of str
        What the report lacks, and why.

    Raises
    ------
    ImportError
        Without the extra "figures".
    OSError
        If the report cannot be written.
    ValueError
        For runs that cannot stand in one table, or that are not complete.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'llava[figures]'") from error

    check_writable(output)
    picture = load_image(image) if image else None
    for sentence in unfinished(folders):
        raise ValueError(f"the run is not complete: {sentence}")
    table = build_table(
        load_runs(folders), intervals=True, folded=folded, allow_mixed=allow_mixed, seed=seed, draws=draws
    )
    check_complete(table.rows)
    figures, left_out = _figures(table.rows, pictures, picture_folder, device, with_model, synthetic)
    cards: list[dict[str, Any]] = []
    if with_model:
        try:
            cards, missing = _cards(table.rows, picture, Path(image).name if image else FIRST_CAPTIONED, device)
            left_out += missing
        except (ImportError, OSError, ValueError) as error:
            left_out.append(f"token maps: {error}")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    text = environment.from_string(files("llava.eval").joinpath(TEMPLATE).read_text(encoding="utf-8")).render(
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
        facts=_facts(table),
        token_style=STYLE,
        token_script=SCRIPT,
    )
    atomic_write(output, text)
    return left_out


def _figures(
    rows: Sequence[Row], pictures: int, folder: Path | None, device: str, with_model: bool, synthetic: bool
) -> tuple[list[Drawn], list[str]]:
    """Every figure of every model that there are data for, and why others are missing."""
    names = (*(FROM_DISTANCES if with_model else ()), *FROM_SCORES)
    models = list(dict.fromkeys(row.model for row in rows if not row.published))
    drawn, left_out = [], []
    for model in models:
        own = [row for row in rows if row.model == model and not row.published]
        try:
            found, missing = draw_figures(names, own, pictures, folder, device, any_of=True)
        except (ImportError, OSError) as error:
            found, missing = draw_figures(tuple(FROM_SCORES), own, pictures, any_of=True)
            missing = [str(error), *missing]
        if len(models) > 1:
            found = [replace(one, name=f"{one.name}-{model}", title=f"{one.title}: {model}") for one in found]
            missing = [f"{model}: {sentence}" for sentence in missing]
        drawn += found
        left_out += missing
    if synthetic:
        drawn += draw_figures(("synthetic",), rows, pictures)[0]
    return drawn, left_out


def _cards(
    rows: Sequence[Row], picture: Image.Image | None, name: str, device: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """What the page opens with: images, what each method keeps of them and, of a benchmark's, what it answered.

    Parameters
    ----------
    rows : sequence of Row
        The first one's model is shown.
    picture : PIL.Image, optional
        Shown instead of the benchmarks' images, without answers.
    name : str
        Of the picture.

    Returns
    -------
    cards : list of dict
    missing : list of str
        Which kinds of images there are none of, and why.
    """
    from llava.eval.distances import Encoder, picture_configs, pictures_of_suite
    from llava.eval.tokens import kept_order
    from llava.eval.views import views_of

    rows = [row for row in rows if row.model == rows[0].model and not row.published]
    drawn = at_one_ratio([(row, configs[0]) for row in rows if (configs := picture_configs(row))])[:MOST_MAPS]
    if not drawn:
        raise ValueError("none of the runs drops tokens before the decoder by what is in the image alone")
    shown = [row for row in rows if row.method == UNPRUNED][:1] + [row for row, _ in drawn]
    others = [row for row in rows if row.pruned and row.ratio == drawn[0][0].ratio and row not in shown]
    examples, missing = ([], []) if picture else find_examples([*shown, *others])
    if not examples:
        if picture is None and not rows[0].runs[0].mini:
            raise ValueError("; ".join([*missing, "give an image of your own (--image)"]))
        examples = [Example("Image", "", name, "", picture or pictures_of_suite(1)["COCO"][0], ())]
    encoder = Encoder.load(rows[0].runs[0].content["model"], device)
    cards = []
    for example in examples:
        pixels = encoder.pixels(example.image)
        views = views_of(example.image, encoder.model.config, encoder.model.get_vision_tower())
        kept: dict[str, list[int] | None] = dict.fromkeys(_name(row) for row in shown)
        for row, config in drawn:
            kept[_name(row)] = kept_order(encoder.model, pixels, example.image.size, config)
        answers = {_name(row): answer for row, answer in zip([*shown, *others], example.answers, strict=False)}
        cards.append(
            {
                "kind": example.kind,
                "benchmark": example.benchmark,
                "question": example.question,
                "truth": example.truth,
                "maps": selection_html(views, kept, example.question, answers),
                "others": [(name, answer) for name, answer in answers.items() if name not in kept],
            }
        )
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


def _facts(table: Table) -> list[tuple[str, str]]:
    """What all runs have in common, then what differs."""
    runs = [run for row in table.rows for run in row.runs]
    differ = differences(runs)
    common: dict[str, str] = {}
    for run in runs:
        common |= run.facts()
    devices = sorted({str(run.manifest["device"]) for run in runs if run.manifest.get("device")})
    commits = sorted({str(run.manifest["git_commit"]) for run in runs if run.manifest.get("git_commit")})
    facts = [("machine", ", ".join(devices))] if devices else []
    facts += [("git commit", ", ".join(commits))] if commits else []
    facts += [(name, value) for name, value in common.items() if name not in differ]
    for name, values in differ.items():
        facts.append((name, "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())))
    return facts


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("llava.eval.report", __doc__)
    add_arguments(parser)
    parser.add_output("report.html")
    parser.add_image(required=False, about="the image of the token maps (default: three of the benchmarks')")
    parser.add_argument("--no-model", action="store_true", help="no distances and token maps, which load the model")
    parser.add_argument("--synthetic", action="store_true", help="the synthetic experiment too (a minute)")
    add_picture_arguments(parser)
    return parser.run(_write, argv)


def _write(found: argparse.Namespace) -> None:
    left_out = write_report(
        found.runs,
        found.output,
        folded=found.fold_seeds,
        allow_mixed=found.allow_mixed,
        seed=found.seed,
        draws=found.draws,
        pictures=found.pictures,
        picture_folder=found.picture_folder,
        image=found.image,
        with_model=not found.no_model,
        synthetic=found.synthetic,
        device=find_device(found.device),
    )
    for sentence in left_out:
        print(f"not in the report: {sentence}")
    print(found.output)


if __name__ == "__main__":
    raise SystemExit(main())
