"""A method's options: their types, and their values as environment variables state them."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from llava.pruning.base import Pruner
from llava.pruning.registry import method_class, method_names

RATIO, LAYER = "SUBSET_RATIO", "LAYER_INDEX"


def option_types(cls: type[Pruner]) -> dict[str, Any]:
    """Option name -> type of a method: its own in the order of its fields, then those that all methods have."""
    hints = typing.get_type_hints(cls)
    common = [field.name for field in dataclasses.fields(Pruner)]
    own = [field.name for field in dataclasses.fields(cls) if field.name not in common]
    return {name: hints[name] for name in own + common}


def ratio_in(environ: Mapping[str, str]) -> float | None:
    """The kept ratio that ``SUBSET_RATIO`` states, None if it is unset; a `ValueError` names what was typed."""
    text = environ.get(RATIO, "")
    if not text:
        return None
    try:
        ratio = _number(float, text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio <= 1:
        raise ValueError(f"SUBSET_RATIO={text}: must be a number with 0 < r <= 1")
    return ratio


def layer_in(environ: Mapping[str, str]) -> int | None:
    """The same for ``LAYER_INDEX``."""
    text = environ.get(LAYER)
    if not text:
        return None
    try:
        layer = _number(int, text)
    except ValueError:
        layer = -1
    if layer < 0:
        raise ValueError(f"LAYER_INDEX={text}: must be a whole number, 0 <= L < the number of decoder layers")
    return layer


def refuse_options_of_an_alias(baseline: str, method: str, environ: Mapping[str, str]) -> None:
    """Options carry the method's own name: under another one they would silently do nothing."""
    alias = f"{baseline.upper()}_"
    if alias == f"{method.upper()}_":
        return
    for name in sorted(environ):
        if name.startswith(alias):
            raise ValueError(
                f"{name}={environ[name]}: {baseline} is {method}, whose options are named {method.upper()}_..."
            )


def settings_in(method: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Variable -> value of a method's options in an environment; a `ValueError` for an unknown or a wrong one."""
    prefix = f"{method.upper()}_"
    known = option_types(method_class(method))
    variables = {name.lower(): f"{prefix}{name.upper()}" for name in known}
    # Of two methods one name may begin with the other, as prumerge_plus does with prumerge.
    others = tuple(f"{name.upper()}_" for name in method_names() if name.startswith(f"{method}_"))
    settings = {}
    for variable in sorted(name for name in environ if name.startswith(prefix) and not name.startswith(others)):
        option = variable[len(prefix) :].lower()
        if option not in known:
            raise ValueError(
                f"{variable}={environ[variable]}: {method} has no such option; "
                f"it knows {', '.join(variables.values()) or 'none'}"
            )
        settings[variable] = _parse(variable, environ[variable], known[option])
    return settings


def _parse(variable: str, text: str, kind: Any) -> Any:
    """Turn an environment variable's text into an option's type."""
    accepted = alternatives(kind)
    if type(None) in accepted and text.strip().lower() in ("", "none"):
        return None
    for candidate in (bool, int, float, str):
        if candidate not in accepted:
            continue
        try:
            return _BOOLEANS[text.strip().lower()] if candidate is bool else _number(candidate, text)
        except (KeyError, ValueError):
            continue
    literals = {str(value).lower(): value for value in accepted if not isinstance(value, type)}
    if text.strip().lower() in literals:
        return literals[text.strip().lower()]
    raise ValueError(f"{variable}={text}: must be {_spell(accepted)}")


def _number(kind: type, text: str) -> Any:
    """The text as a float, an int or a str; Python itself would read 1_0 as 10."""
    if kind is not str and ("_" in text or not text.isascii()):
        raise ValueError(text)
    return kind(text)


def check_type(what: str, value: Any, kind: Any) -> None:
    """Raise a `ValueError`, which calls the value ``what``, if an annotation does not admit it."""
    accepted = alternatives(kind)
    if value in [item for item in accepted if not isinstance(item, type)]:
        return
    kinds = tuple(item for item in accepted if isinstance(item, type))
    if float in kinds:
        kinds += (int,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{what} must be {_spell(accepted)}, not {value!r}")


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_SPELLING = {bool: "1 or 0", int: "a whole number", float: "a number", str: "text", type(None): "none"}


def alternatives(kind: Any) -> list[Any]:
    """The types and literal values that an annotation admits."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return list(typing.get_args(kind))
    if origin in (typing.Union, types.UnionType):
        return [item for part in typing.get_args(kind) for item in alternatives(part)]
    return [kind]


def _spell(accepted: list[Any]) -> str:
    return " or ".join(_SPELLING.get(item, repr(item)) if isinstance(item, type) else str(item) for item in accepted)
