"""What the documents list of the methods is what is installed."""

from __future__ import annotations

import re
from pathlib import Path

from llava.pruning import available_methods
from llava.pruning.registry import MethodInfo, common_options

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "LLaVA" / "docs"


def test_the_readme_lists_every_value_of_the_switch():
    [row] = re.findall(r"^\| `BASELINE` \|.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = row.partition("`OURS` = ")[2]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(name.upper() for name in available_methods())


def listed(name: str, info: MethodInfo) -> str:
    published = f"{info.venue} {info.year}" if info.venue else ""
    needs = ", ".join(f"`{need}`" for need in sorted(info.needs)) or "visual tokens"
    cells = [f"`{name}`", published, info.where.removesuffix(" the decoder"), needs, info.towers]
    return f"| {' | '.join([*cells, 'yes' if info.merges else '', info.cost])} |"


def test_the_table_of_methods_is_the_listing():
    methods = available_methods()
    expected = ["| name | published | works | looks at | towers | merges | what choosing costs |", "| --- " * 7 + "|"]
    expected += [listed(name, info) for name, info in methods.items()]
    assert "\n".join(expected) in (DOCS / "methods.md").read_text(), "\n".join(expected)
    assert all(info.source and info.cost and bool(info.venue) == bool(info.year) for info in methods.values())


def test_the_environment_page_lists_every_option_with_its_default():
    """The table that it should hold is in the message of the failure."""
    wanted = [
        "| method | variables, with their defaults |",
        "| --- | --- |",
        row("<METHOD>", common_options(), "every"),
    ]
    wanted += [row(name, info.options, f"`{name}`") for name, info in available_methods().items() if info.options]
    page = (DOCS / "environment.md").read_text().splitlines()
    begin = page.index(wanted[0])
    assert page[begin : begin + len(wanted)] == wanted, "\n".join(wanted)


def row(method: str, options: dict[str, object], name: str) -> str:
    shown = (
        "unset" if value is None else int(value) if isinstance(value, bool) else value for value in options.values()
    )
    variables = (f"`{method.upper()}_{option.upper()}={value}`" for option, value in zip(options, shown, strict=True))
    return f"| {name} | {', '.join(variables)} |"
