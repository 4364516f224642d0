"""The KV cache under either of its names: transformers 5.24 calls ``cache`` what was ``past_key_values`` before."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import LlamaModel
from transformers.cache_utils import Cache

NAMES = ("cache", "past_key_values")


def _name_in(parameters: Mapping[str, Any]) -> str:
    name = next((name for name in NAMES if name in parameters), None)
    if name is None:
        raise ImportError(f"this transformers calls the KV cache neither {' nor '.join(NAMES)}: use an older one")
    return name


CACHE = _name_in(inspect.signature(LlamaModel.forward).parameters)
"""What the installed transformers calls it, in arguments of forward passes and masks and in outputs."""


def cache_among(past_key_values: Cache | None, others: dict[str, Any]) -> Cache | None:
    """The cache of a call, whatever name it came under; taken out of the other keyword arguments.

    Raises
    ------
    TypeError
        If one came under a name that is not known: decoding without it would give other tokens.
    ValueError
        If it came under both names.
    """
    cache = others.pop("cache", None)
    if cache is not None and past_key_values is not None:
        raise ValueError("give the KV cache as `cache` or as `past_key_values`, not as both")
    unknown = [name for name, value in others.items() if isinstance(value, Cache)]
    if unknown:
        raise TypeError(f"`{unknown[0]}` is a KV cache under an unknown name: allowed are {' and '.join(NAMES)}")
    return past_key_values if cache is None else cache
