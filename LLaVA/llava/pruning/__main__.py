"""``python -m llava.pruning``: the methods that are installed, with stage, needs, options and source."""

from __future__ import annotations

import argparse

from llava.pruning import available_methods


def main(argv: list[str] | None = None) -> None:
    """Print one paragraph a method."""
    argparse.ArgumentParser(prog="python -m llava.pruning", description=__doc__).parse_args(argv)
    for name, info in available_methods().items():
        options = ", ".join(f"{name.upper()}_{option.upper()}={value}" for option, value in info.options.items())
        print(f"{name}\n    {info.source}")
        print(f"    stage: {info.stage}; needs: {', '.join(sorted(info.needs)) or 'the visual tokens only'}")
        print(f"    options: {options or 'none'}")


if __name__ == "__main__":
    main()
