"""Reading the methods to compare from a command line."""

from __future__ import annotations

from llava.pruning import PruningConfig

UNPRUNED, PUBLISHED = "unpruned", "published"


def read_method(text: str, ratio: float) -> PruningConfig:
    """A method as `PruningConfig.from_text` reads it, ``NAME@LAYER``, or "published", OTPrune's published code.

    Parameters
    ----------
    text : str
    ratio : float
        Kept ratio.

    Raises
    ------
    ValueError
        For an unknown method, a layer that is no whole number, or a ratio that the method does not take.
    """
    if text == PUBLISHED:
        return PruningConfig("otprune", ratio, options={"compat": True})
    name, at, layer = text.partition("@")
    if at and not layer.isdecimal():
        raise ValueError(f"a method is NAME or NAME@LAYER, not {text!r}")
    return PruningConfig.from_text(f"{name}:layer={layer}" if at else name, ratio, {})


def read_methods(texts: list[str], ratio: float) -> dict[str, PruningConfig]:
    """Label -> configuration, in the order given."""
    return {text: read_method(text, ratio) for text in texts}
