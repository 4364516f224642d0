"""Visual token pruning: select tokens from any features, prune a model, write a method; needs torch alone."""

from llava.pruning.api import apply_switch, prune, pruning, select, unprune
from llava.pruning.base import Pruner
from llava.pruning.checks import deferred_checks
from llava.pruning.config import PruningConfig
from llava.pruning.registry import available_methods, register
from llava.pruning.schedule import kept_count
from llava.pruning.tokens import KeptTokens, VisualTokens

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
