"""Visual token pruning: the switch, the contract of a method, and the doorway to all of them."""

from llava.pruning.base import KeptTokens, Pruner, VisualTokens, kept_count
from llava.pruning.checks import deferred_checks
from llava.pruning.config import PruningConfig
from llava.pruning.doorway import apply_switch, prune, pruning, select, unprune
from llava.pruning.registry import available_methods, register

__all__ = [
    "KeptTokens",
    "Pruner",
    "PruningConfig",
    "VisualTokens",
    "apply_switch",
    "available_methods",
    "deferred_checks",
    "kept_count",
    "prune",
    "pruning",
    "register",
    "select",
    "unprune",
]
