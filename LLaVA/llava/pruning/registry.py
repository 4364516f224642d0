"""Method names and their classes, imported when first used."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from llava.pruning.base import Pruner
from llava.pruning.signals import CLS_SIGNALS, ENCODER_SIGNALS

ENTRY_POINT_GROUP = "llava.pruning"

_TARGETS: dict[str, str] = {
    "otprune": "llava.model.llava_arch:OTPrune",
    "cdpruner": "llava.pruning.methods.cdpruner:CDPruner",
    "coverage": "llava.pruning.methods.coverage:Coverage",
    "dart": "llava.pruning.methods.dart:DART",
    "divprune": "llava.pruning.methods.divprune:DivPrune",
    "downsample": "llava.pruning.methods.downsample:Downsample",
    "dpp": "llava.pruning.methods.dpp:DPP",
    "fastervlm": "llava.pruning.methods.fastervlm:FasterVLM",
    "fastv": "llava.pruning.methods.fastv:FastV",
    "first_k": "llava.pruning.methods.first_k:FirstK",
    "fitprune": "llava.pruning.methods.fitprune.pruner:FitPrune",
    "flowcut": "llava.pruning.methods.flowcut:FlowCut",
    "hiprune": "llava.pruning.methods.hiprune:HiPrune",
    "holov": "llava.pruning.methods.holov:HoloV",
    "last_k": "llava.pruning.methods.last_k:LastK",
    "mmr": "llava.pruning.methods.mmr:MMR",
    "ocvtp": "llava.pruning.methods.ocvtp.pruner:OCVTP",
    "prumerge": "llava.pruning.methods.prumerge:PruMerge",
    "prumerge_plus": "llava.pruning.methods.prumerge:PruMergePlus",
    "prunesid": "llava.pruning.methods.prunesid:PruneSID",
    "pyramiddrop": "llava.pruning.methods.pyramiddrop:PyramidDrop",
    "random": "llava.pruning.methods.random:Random",
    "scope": "llava.pruning.methods.scope:SCOPE",
    "scorer": "llava.pruning.methods.scorer:Scorer",
    "sparsevlm": "llava.pruning.methods.sparsevlm:SparseVLM",
    "uniform": "llava.pruning.methods.uniform:Uniform",
    "visionzip": "llava.pruning.methods.visionzip:VisionZip",
    "vispruner": "llava.pruning.methods.vispruner:VisPruner",
    "vscan": "llava.pruning.methods.vscan:VScan",
    "vtw": "llava.pruning.methods.vtw:VTW",
}
_ALIASES = {"ours": "otprune", "prumerge+": "prumerge_plus"}


@dataclass(frozen=True)
class MethodInfo:
    """What `available_methods` tells of one method.

    Attributes
    ----------
    where : str
        Where it works.
    needs : frozenset of str
        What it asks of the model beyond the visual tokens.
    options : dict
        Option name -> default; `common_options` come on top of these.
    source, venue : str
        Paper or definition, and where it was published.
    year : int or None
        Of the publication.
    towers : str
        Vision encoders that it works with.
    merges : bool
        Whether tokens are merged and not only chosen.
    cost : str
        What choosing costs beside the model; see `Pruner`.
    licence : str
        A note on the licence of the published code; empty where there is none to note.
    """

    where: str
    needs: frozenset[str]
    options: dict[str, Any]
    source: str
    venue: str
    year: int | None
    towers: str
    merges: bool
    cost: str
    licence: str = ""

    @property
    def stage(self) -> str:
        """``where`` by its former name."""
        return self.where


def register(name: str, target: str) -> None:
    """Add a method under a new name.

    Parameters
    ----------
    name : str
        Case-insensitive; also the prefix of the method's environment variables.
    target : str
        ``"module:Class"`` of a `Pruner`, imported when first used.

    Raises
    ------
    ValueError
        If the name is taken by another target, or the target has no colon.
    """
    name = name.lower()
    if ":" not in target:
        raise ValueError(f'The target of method {name!r} must read "module:Class", not {target!r}')
    if name == "orig" or name in _ALIASES or _targets().get(name, target) != target:
        raise ValueError(f"The method name {name!r} is taken")
    _TARGETS[name] = target


def resolve_name(name: str) -> str:
    """The registered name of a name or alias in any case.

    Raises
    ------
    ValueError
        If there is none; the message lists what there is.
    """
    lowered = str(name).strip().lower()
    lowered = _ALIASES.get(lowered, lowered)
    if lowered not in _targets():
        raise ValueError(f"unknown method {name!r}; available: {', '.join(method_names())}")
    return lowered


def method_names() -> list[str]:
    """Every registered name, sorted; imports no method."""
    return sorted(_targets())


def method_class(name: str) -> type[Pruner]:
    """Import the class of a method.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If the target is no `Pruner`.
    """
    target = _targets()[resolve_name(name)]
    module, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Pruner)):
        raise TypeError(f"{target} is not a Pruner")
    return found


def available_methods() -> dict[str, MethodInfo]:
    """Every registered method: name -> where, needs, options with their defaults, source."""
    return {name: _info(method_class(name)) for name in method_names()}


def common_options() -> dict[str, Any]:
    """The options that every method has: name -> default."""
    return {field.name: field.default for field in dataclasses.fields(Pruner)}


def _info(cls: type[Pruner]) -> MethodInfo:
    pruner = cls()
    common = common_options()
    defaults = {
        field.name: getattr(pruner, field.name) for field in dataclasses.fields(cls) if field.name not in common
    }
    return MethodInfo(
        pruner.where,
        pruner.needs,
        defaults,
        cls.source,
        cls.venue,
        cls.year,
        _towers(pruner),
        pruner.merges,
        cls.cost,
        cls.licence,
    )


def _towers(pruner: Pruner) -> str:
    """The vision encoders whose signals a method can be given."""
    if "text_similarity" in pruner.needs:
        return "CLIP with its text tower"
    if hasattr(pruner, "checkpoint"):
        return "the one that its network was trained on"
    if not pruner.needs & ENCODER_SIGNALS:
        return "any"
    return "with [CLS]" if pruner.for_encoder(has_cls=False).needs & CLS_SIGNALS else "with [CLS] or without"


def _targets() -> dict[str, str]:
    """Built-in and registered methods, and those that installed packages announce; the project's own names win."""
    return _announced(tuple(sys.path)) | _TARGETS


@cache
def _announced(path: tuple[str, ...]) -> dict[str, str]:
    """What packages on ``path`` announce, looked up once: it takes longer than many a prefill."""
    return {point.name.lower(): point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
