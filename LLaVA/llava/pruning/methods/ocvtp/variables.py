"""The environment variables that OC-VTP's users know, read as the switch of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping

SWITCH = "OCL_ENABLE"
DEFAULT_TARGET = "64"
LAST_LAYER = "-2"
"""The layer that the published code names by its place among the hidden states, and where it always pads at random."""

_FLAGS = {"1": "1", "true": "1", "0": "0", "false": "0"}
_PADDING = {"att_score": "attention", "random": "random", "none": "none"}
_ATTENTION = {"meanq": "mean", "cls": "cls"}


def translated(environ: Mapping[str, str]) -> Mapping[str, str]:
    """An environment with ``OCL_...`` variables, as one with ``BASELINE`` and ``OCVTP_...``.

    It is returned unchanged where it has no such variable, or only empty ones. A ValueError for an unknown variable, a
    value that is not allowed, variables without the switch, or a second switch beside it.
    """
    given = {name: value for name, value in environ.items() if name.startswith("OCL_") and value}
    if not given:
        return environ
    unknown = sorted(set(given) - {SWITCH, "OCL_MODE", *_OPTIONS})
    if unknown:
        raise ValueError(
            f"{unknown[0]}={given[unknown[0]]}: OC-VTP has no such variable; it knows {SWITCH}, OCL_MODE, "
            f"{', '.join(_OPTIONS)}"
        )
    if SWITCH not in given:
        name = next(iter(given))
        raise ValueError(f"{name}={given[name]} is set but {SWITCH} is not: {SWITCH}=1 prunes, {SWITCH}=0 does not")
    rest = {name: value for name, value in environ.items() if name not in given}
    if _choice(SWITCH, given[SWITCH], _FLAGS) == "0":
        return rest
    for name in sorted(rest):
        if rest[name] and (name in ("BASELINE", "SUBSET_RATIO", "LAYER_INDEX") or name.startswith("OCVTP_")):
            raise ValueError(
                f"{name}={rest[name]} is set beside {SWITCH}=1: use one switch or the other (OCL_TARGET_NUM sets how "
                "many tokens are kept)"
            )
    mode = given.get("OCL_MODE", "pruning")
    if mode != "pruning":
        raise ValueError(f"OCL_MODE={mode}: must be pruning, the only mode that the published code has")
    own = {"OCVTP_TARGET": DEFAULT_TARGET}
    for name, (option, read) in _OPTIONS.items():
        if name in given:
            own[option] = read(name, given[name])
    if given.get("OCL_LAYER_IDX") == LAST_LAYER:
        own["OCVTP_PAD"] = "random"
    return {**rest, "BASELINE": "OCVTP", **own}


def as_typed(given: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Variable of ``environ``, the translated ``given`` -> ``NAME=value`` as it stands in ``given``, if it does."""
    names = {} if environ is given else {option: name for name, (option, _) in _OPTIONS.items()}
    spelled = {variable: names.get(variable, variable) for variable in environ}
    return {variable: f"{name}={given[name]}" for variable, name in spelled.items() if name in given}


def _text(name: str, text: str) -> str:
    return text


def _whole(name: str, text: str) -> str:
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise ValueError(f"{name}={text}: must be a whole number >= 1")
    return str(int(text))


def _layer(name: str, text: str) -> str:
    """The published numbers are 0-based; -2 is the last layer that runs."""
    if text == LAST_LAYER:
        return "-1"
    if not text.isdecimal():
        raise ValueError(f"{name}={text}: must be a layer of the vision encoder counted from 0, or {LAST_LAYER}")
    return text


def _choice(name: str, text: str, choices: Mapping[str, str]) -> str:
    if text.lower() not in choices:
        raise ValueError(f"{name}={text}: must be {' or '.join(choices)}")
    return choices[text.lower()]


_OPTIONS: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "OCL_LAYER_IDX": ("OCVTP_ENCODER_LAYER", _layer),
    "OCL_CONFIG": ("OCVTP_CONFIG", _text),
    "OCL_CKPT": ("OCVTP_CHECKPOINT", _text),
    "OCL_TARGET_NUM": ("OCVTP_TARGET", _whole),
    "OCL_TOPK": ("OCVTP_TOP_K", _whole),
    "OCL_HAS_CLS": ("OCVTP_HAS_CLS", lambda name, text: _choice(name, text, _FLAGS)),
    "OCL_PAD_MODE": ("OCVTP_PAD", lambda name, text: _choice(name, text, _PADDING)),
    "OCL_ATTSEL": ("OCVTP_ATTENTION", lambda name, text: _choice(name, text, _ATTENTION)),
}
