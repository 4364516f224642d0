"""``python -m llava.pruning``: the installed methods, where and on what towers each works, its needs, cost, options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava.command import Parser
from llava.pruning import available_methods
from llava.pruning.registry import common_options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: one paragraph per method."""
    return Parser("llava.pruning", __doc__.partition(": ")[2]).run(lambda _: _print_methods(), argv)


def _print_methods() -> None:
    for name, info in available_methods().items():
        options = ", ".join(
            f"{name.upper()}_{option.upper()}={_default(value)}" for option, value in info.options.items()
        )
        published = f" ({' '.join(filter(None, (info.venue, str(info.year or ''))))})" if info.venue else ""
        print(f"{name}\n    {info.source}{published}")
        print(f"    where: {info.where}; needs: {', '.join(sorted(info.needs)) or 'the visual tokens only'}")
        print(f"    towers: {info.towers}; {'merges' if info.merges else 'chooses'} tokens; cost: {info.cost}")
        print(f"    options: {options or 'none of its own'}")
        if info.licence:
            print(f"    published code: {info.licence}")
    common = ", ".join(f"<METHOD>_{option.upper()}={value}" for option, value in common_options().items())
    print(f"\nevery method: {common}")


def _default(value: Any) -> str:
    return "unset" if value is None else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
