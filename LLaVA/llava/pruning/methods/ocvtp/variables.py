"""The environment variables that OC-VTP's users know, read as the switch of this package."""

from __future__ import annotations

from collections.abc import Mapping

SWITCH, LAYER = "OCL_ENABLE", "OCL_LAYER_IDX"
DEFAULT_TARGET = "64"
LAST_LAYER = "-2"
"""The layer that the published code names by its place among the hidden states, and where it always pads at random."""

OPTIONS = {
    LAYER: "OCVTP_ENCODER_LAYER",
    "OCL_CONFIG": "OCVTP_CONFIG",
    "OCL_CKPT": "OCVTP_CHECKPOINT",
    "OCL_TARGET_NUM": "OCVTP_TARGET",
    "OCL_TOPK": "OCVTP_TOP_K",
    "OCL_HAS_CLS": "OCVTP_HAS_CLS",
    "OCL_PAD_MODE": "OCVTP_PAD",
    "OCL_ATTSEL": "OCVTP_ATTENTION",
}
_NUMBERS = ("OCL_TARGET_NUM", "OCL_TOPK")
_FLAGS = {"1": "1", "true": "1", "0": "0", "false": "0"}
_CHOICES = {
    SWITCH: _FLAGS,
    "OCL_MODE": {"pruning": "pruning"},  # the only mode of the published code
    "OCL_HAS_CLS": _FLAGS,
    "OCL_PAD_MODE": {"att_score": "attention", "random": "random", "none": "none"},
    "OCL_ATTSEL": {"meanq": "mean", "cls": "cls"},
}


def translated(environ: Mapping[str, str]) -> Mapping[str, str]:
    """An environment with ``OCL_...`` variables, as one with ``BASELINE`` and ``OCVTP_...``.

    It is returned unchanged where it has no such variable, or only empty ones. A ValueError for an unknown variable, a
    value that is not allowed, variables without the switch, or a second switch beside it.
    """
    given = {name: value for name, value in environ.items() if name.startswith("OCL_") and value}
    if not given:
        return environ
    known = (SWITCH, "OCL_MODE", *OPTIONS)
    for name in sorted(given.keys() - set(known)):
        raise ValueError(f"{name}={given[name]}: OC-VTP has no such variable; it knows {', '.join(known)}")
    if SWITCH not in given:
        name = next(iter(given))
        raise ValueError(f"{name}={given[name]} is set but {SWITCH} is not: {SWITCH}=1 prunes, {SWITCH}=0 does not")
    rest = {name: value for name, value in environ.items() if name not in given}
    if _read(SWITCH, given[SWITCH]) == "0":
        return rest
    for name in sorted(rest):
        if rest[name] and (name in ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX") or name.startswith("OCVTP_")):
            raise ValueError(
                f"{name}={rest[name]} is set beside {SWITCH}=1: use one switch or the other (OCL_TARGET_NUM sets how "
                "many tokens are kept)"
            )
    read = {name: _read(name, text) for name, text in given.items()}
    own = {"OCVTP_TARGET": DEFAULT_TARGET} | {OPTIONS[name]: value for name, value in read.items() if name in OPTIONS}
    if given.get(LAYER) == LAST_LAYER:
        own["OCVTP_PAD"] = "random"
    return {**rest, "BASELINE": "OCVTP", **own}


def as_typed(given: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Variable of ``environ``, the translated ``given`` -> ``NAME=value`` as it stands in ``given``, if it does."""
    names = {} if environ is given else {option: name for name, option in OPTIONS.items()}
    spelled = {variable: names.get(variable, variable) for variable in environ}
    return {variable: f"{name}={given[name]}" for variable, name in spelled.items() if name in given}


def _read(name: str, text: str) -> str:
    """A variable's value as our option has it; the published layers are 0-based."""
    if name == LAYER and text != LAST_LAYER and not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{name}={text}: must be a layer of the vision encoder counted from 0, or {LAST_LAYER}")
    if name == LAYER:
        return "-1" if text == LAST_LAYER else text
    if name in _NUMBERS and not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise ValueError(f"{name}={text}: must be a whole number >= 1")
    choices = _CHOICES.get(name)
    if choices is None:
        return text
    if text.lower() not in choices:
        raise ValueError(f"{name}={text}: must be {' or '.join(choices)}")
    return choices[text.lower()]
