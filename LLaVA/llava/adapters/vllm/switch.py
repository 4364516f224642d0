"""Which method prunes a served model, and what an engine with a paged KV cache cannot serve."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Real
from typing import Any

from llava.pruning import PruningConfig
from llava.pruning.signals import ENCODER_SIGNALS

RATIO = "visual_token_ratio"
"""Key of a request's ``mm_processor_kwargs``, and field of an image's tensors: the kept ratio of its tokens."""
OVERRIDE = "visual_token_pruning"
"""Key of ``--hf-overrides``: the configuration for workers that do not inherit the environment."""
PLUGIN = "otprune"
"""The entry point's name, for ``VLLM_PLUGINS``."""
SERVED_SIGNALS = ENCODER_SIGNALS - {"final_keys", "final_cls_attention"} | {"image_keys"}
"""What the plug-in computes; vLLM does not load the layers of the vision encoder after the one that is read."""
RELEASES = ("0.32", "0.33")
"""Releases of vLLM that were tried."""


def is_on(environ: Mapping[str, str]) -> bool:
    """Whether ``BASELINE`` names a method, or ``VLLM_PLUGINS`` names this plug-in (as ``--hf-overrides`` needs it)."""
    baseline = environ.get("BASELINE", "").strip().lower()
    if baseline:
        return baseline != "orig"
    return PLUGIN in environ.get("VLLM_PLUGINS", "").split(",")


def check_release(version: str) -> None:
    """Refuse a release of vLLM that was not tried with a `ValueError`: its internal interfaces change."""
    if ".".join(version.split(".")[:2]) not in RELEASES:
        tried = " and ".join(f"{release}.*" for release in RELEASES)
        raise ValueError(
            f"visual token pruning was tried with vLLM {tried}, not {version}; unset BASELINE, or change it"
        )


def check_servable(config: PruningConfig) -> None:
    """Refuse a method that an engine cannot serve.

    Raises
    ------
    ValueError
        Says why.
    """
    pruner, method = config.build_pruner(), config.method
    if config.layer != 0:
        raise ValueError(
            f"{method} drops tokens inside the decoder, and a paged KV cache has one length for all layers: vLLM "
            "serves methods that choose before the decoder"
        )
    if not pruner.count_is_known:
        raise ValueError(f"{method} keeps as many tokens as the image needs, and vLLM must know the number beforehand")
    missing = sorted(pruner.needs - SERVED_SIGNALS)
    if missing:
        raise ValueError(f"{method} needs {', '.join(missing)}, which vLLM's models do not give")


def configured(override: Mapping[str, Any] | None, environ: Mapping[str, str] = os.environ) -> PruningConfig:
    """The configuration of the environment, or of ``--hf-overrides``.

    Parameters
    ----------
    override : mapping or None
        ``{"method": ..., "ratio": ..., "options": {...}}``, as in `PruningConfig`.
    environ : mapping

    Raises
    ------
    ValueError
        If neither names a method, both do and differ, or the method cannot be served.
    """
    config = PruningConfig.from_env(environ)
    if override is not None:
        if not isinstance(override, Mapping) or not {"method"} <= set(override) <= {"method", "ratio", "options"}:
            raise ValueError(f"{OVERRIDE} must be a mapping with method, ratio and options, not {override!r}")
        stated = PruningConfig(**override)
        if config is not None and config != stated:
            raise ValueError(f"BASELINE and {OVERRIDE} differ: {config.describe()}, and {stated.describe()}")
        config = stated
    if config is None:
        raise ValueError(f"VLLM_PLUGINS names {PLUGIN}, but neither BASELINE nor {OVERRIDE} names a method")
    check_servable(config)
    return config


def ratio_of(kwargs: Mapping[str, Any], default: float | None) -> float:
    """The kept ratio that a request names in its ``mm_processor_kwargs``, or the default.

    Raises
    ------
    ValueError
        If it is not a number with 0 < r <= 1.
    """
    ratio = kwargs.get(RATIO, default)
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < float(ratio) <= 1:
        raise ValueError(f"{RATIO} must be a number with 0 < r <= 1, not {ratio!r}")
    return float(ratio)


def without_ratio(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A request's ``mm_processor_kwargs`` as transformers' processors take them."""
    return {name: value for name, value in kwargs.items() if name != RATIO}
