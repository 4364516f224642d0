"""Adds the pruning configuration to the key of lmms-eval's ``--use_cache``.

The key has the model's id and arguments but not the environment, so a run that keeps half of the visual tokens would
get the cached answers of one that keeps a tenth.
"""

from __future__ import annotations

from typing import Any

from lmms_eval.caching.response_cache import ResponseCache

_create = ResponseCache.create.__func__
_extension = ""
_in_use = False


def extend_with(fingerprint: str) -> None:
    """Make ``fingerprint`` part of the key of every response cache opened from now on."""
    global _extension, _in_use
    _extension = fingerprint
    _in_use = False
    ResponseCache.create = classmethod(_create_extended)


def in_use() -> bool:
    """Whether a response cache was opened since the last `extend_with`."""
    return _in_use


def _create_extended(cls: type[ResponseCache], *args: Any, model: Any = "", **kwargs: Any) -> ResponseCache:
    global _in_use
    _in_use = True
    # A loaded model would otherwise put its memory address into the key, and never hit.
    name = model if isinstance(model, str) else type(model).__name__
    return _create(cls, *args, model=f"{name}|{_extension}", **kwargs)
