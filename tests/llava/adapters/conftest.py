"""Pruning a model of transformers takes encoded images apart from pixels: transformers 5.18 and later."""

from __future__ import annotations

from tiny_vlms import CAN_BE_PRUNED

collect_ignore_glob = [] if CAN_BE_PRUNED else ["test_*.py"]
