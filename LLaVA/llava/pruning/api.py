"""The public functions: select tokens from any features, and prune a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from numbers import Integral
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch

from llava.pruning.config import PruningConfig
from llava.pruning.own_budget import count_of
from llava.pruning.signals import content_key
from llava.pruning.tokens import VisualTokens


def select(
    features: torch.Tensor,
    ratio: float | None = None,
    method: str = "otprune",
    *,
    k: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """Choose which of N tokens to keep; needs no LLaVA model.

    Parameters
    ----------
    features : Tensor (N, D) or (B, N, D), floating, any device
        The tokens, one row each.
    ratio : float, optional
        Kept ratio, 0 < ratio <= 1; 0.098, the published setting, when neither it nor ``k`` is given.
    method : str
        One of `available_methods`.
    k : int, optional
        Number of tokens to keep, instead of ``ratio``; k >= N keeps all.
    **options
        The method's own options.

    Returns
    -------
    Tensor (k,) or (B, k), int64, on the features' device
        Ascending (raster order), except where an option of the method says otherwise.

    Raises
    ------
    ValueError
        For features that are not a finite floating matrix, both ``ratio`` and ``k``, an unknown method or option, or a
        value out of range.
    """
    if ratio is not None and k is not None:
        raise ValueError(f"give either ratio or k, not both (ratio={ratio!r}, k={k!r})")
    if k is not None and (isinstance(k, bool) or not isinstance(k, Integral) or k < 1):
        raise ValueError(f"k must be a whole number >= 1, not {k!r}")
    if not isinstance(features, torch.Tensor) or features.ndim not in (2, 3):
        found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(f"features must be a tensor (N, D) or (B, N, D), not {found}")
    if ratio is None:
        ratio = 0.098 if k is None else 1.0
    config = PruningConfig(method=method, ratio=ratio, options=options)
    batch = features if features.ndim == 3 else features.unsqueeze(0)
    pruner = config.build_pruner()
    budgets = {count_of(pruner, row, ratio) for row in batch} if k is None and batch.numel() else {int(k or 1)}
    if len(budgets) > 1:
        raise ValueError(f"with budget={pruner.budget} these rows keep {sorted(budgets)} tokens: give one at a time")
    tokens = VisualTokens(batch, budgets.pop())
    if "image_keys" in pruner.needs:
        tokens = replace(tokens, image_keys=tuple(content_key(row) for row in batch))
    indices = pruner.indices(tokens)
    return indices if features.ndim == 3 else indices[0]


class _Block:
    """One `pruning` block on a model; ``before`` is what to bring back at its end."""

    def __init__(self, before: Any):
        self.before = before


_blocks: WeakKeyDictionary[Any, list[_Block]] = WeakKeyDictionary()
_lock = Lock()
_own: ContextVar[tuple[_Block, ...]] = ContextVar("own", default=())
"""The blocks that this thread (or asynchronous task) is in."""


@contextmanager
def pruning(
    model: Any, method: str | PruningConfig, ratio: float | None = None, layer: int | None = None, **options: Any
) -> Iterator[Any]:
    """Prune with a method inside a ``with`` block, and restore what the model did before.

    Blocks of one thread may stand in one another. A model has one method at a time, for all threads that use it.

    Parameters
    ----------
    model
        A LLaVA model of this package, or a vision-language model of transformers (docs/models.md says which).
    method, ratio, layer, **options
        As in `PruningConfig`; or a `PruningConfig` alone.

    Yields
    ------
    object
        Its ``visual_token_counts`` are (total, kept) of each image of the latest call.

    Raises
    ------
    ValueError
        For an unknown method or option, a value out of range, or a model in which the method cannot work.
    RuntimeError
        If another thread (or asynchronous task) is in such a block with the same model.
    """
    config = method if isinstance(method, PruningConfig) else PruningConfig(method, ratio, layer, options)
    model = _unwrapped(model)
    with _lock:
        blocks = _blocks.setdefault(model, [])
        if not set(blocks) <= set(_own.get()):
            raise RuntimeError(
                f"another thread or task is in a pruning block with this model: a model prunes with one method at a "
                f"time, so {config.method} has to wait, or use a copy of the model"
            )
        block = _Block(model.active_pruner if _is_ours(model) else _active(model))
        report = _set(model, config)
        blocks.append(block)
    _own.set((*_own.get(), block))
    try:
        yield report
    finally:
        _own.set(tuple(one for one in _own.get() if one is not block))
        with _lock:
            place = blocks.index(block)
            del blocks[place]
            if place < len(blocks):  # the blocks of a generator may end in any order
                blocks[place].before = block.before
            elif _is_ours(model):
                model.active_pruner = block.before
            else:
                _set(model, block.before)


def prune(model: Any, method: str, ratio: float | None = None, layer: int | None = None, **options: Any) -> None:
    """Prune with a method from now on, and say so in a line on standard error; see `pruning`."""
    _set(model, PruningConfig(method=method, ratio=ratio, layer=layer, options=options))
    _announce(model)


def unprune(model: Any) -> None:
    """Leave a model as it was before `prune`, bit for bit."""
    _set(model, None)


def apply_switch(model: Any, environ: Mapping[str, str] = os.environ) -> PruningConfig | None:
    """Prune a loaded model as ``BASELINE``, ``SUBSET_RATIO`` and the other variables of the switch say.

    Models of this package do so when they are built.

    Returns
    -------
    PruningConfig, or None
        What prunes the model now; None when the switch is off.

    Raises
    ------
    ValueError
        Names a variable, its value and what is allowed; or says why the method cannot work in this model.
    """
    _set(model, PruningConfig.from_env(environ))
    _announce(model)
    return _active(model)


def _unwrapped(model: Any) -> Any:
    """The model inside the wrappers of PEFT, DistributedDataParallel and torch.compile."""
    if hasattr(model, "get_base_model"):
        return _unwrapped(model.get_base_model())
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    return model if inner is None else _unwrapped(inner)


def _is_ours(model: Any) -> bool:
    return hasattr(model, "set_pruning")


def _active(model: Any) -> PruningConfig | None:
    model = _unwrapped(model)
    if _is_ours(model):
        return model.pruning
    from llava.adapters.transformers import active_session

    session = active_session(model)
    return None if session is None else session.config


def _set(model: Any, config: PruningConfig | None) -> Any:
    model = _unwrapped(model)
    if _is_ours(model):
        model.set_pruning(config)
        return model
    from llava.adapters.transformers import set_pruning

    return set_pruning(model, config)


def _announce(model: Any) -> None:
    config = _active(model)
    if config is not None:
        print(f"{_unwrapped(model).config.model_type}: {config.describe()}", file=sys.stderr)
