"""Checks lmms-eval's command line for what would fail much later."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

from lmms_eval.utils import simple_parse_args_string

from lmms_eval_otprune.models.settings import GenerationSettings


def started_from_command_line() -> bool:
    """Whether lmms-eval's own command (not Python code) runs this process."""
    return "lmms_eval.__main__" in sys.modules


def names_our_model() -> bool:
    """Whether the command line names the model id ``llava``."""
    return any(argument in ("llava", "--model=llava") for argument in sys.argv[1:])


def check(arguments: Sequence[str]) -> None:
    """Refuse what lmms-eval would fail on much later, or silently ignore.

    Raises
    ------
    ValueError
        Names the option, its value and what is allowed.
    """
    if "," in (output := _value(arguments, "--output_path")):
        raise ValueError(f"--output_path {output}: lmms-eval cannot write into a folder with a comma in its name")
    if (examples := _value(arguments, "--num_fewshot")) not in ("", "0"):
        raise ValueError(f"--num_fewshot {examples}: llava is asked without examples, so only 0 is allowed")
    for option in ("--model_args", "--gen_kwargs"):
        try:
            found = simple_parse_args_string(_value(arguments, option))
        except ValueError:
            raise ValueError(
                f"{option} {_value(arguments, option)}: must read name=value,name=value; no value may hold a comma"
            ) from None
    for name, value in found.items():
        if name not in (*GenerationSettings.names(), "do_sample"):
            names = ", ".join(GenerationSettings.names())
            raise ValueError(f"--gen_kwargs {name}={value}: has no effect here, only {names} have")
    settings = GenerationSettings.read(found)
    if found.get("do_sample", settings.temperature > 0) != (settings.temperature > 0) or (
        settings.temperature == 0 and "top_p" in found
    ):
        raise ValueError(
            f"--gen_kwargs {_value(arguments, '--gen_kwargs')}: llava samples where temperature is above 0"
        )


def _value(arguments: Sequence[str], option: str) -> str:
    """The value of an option, the last one given; empty without it."""
    found = ""
    for argument, following in pairwise([*arguments, ""]):
        if argument == option:
            found = following
        elif argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
    return found
