"""lmms-eval's own wrappers of transformers' models, with the pruning that the environment asks for.

A subclass of a wrapper is made when lmms-eval loads it. The wrapper itself is not touched, and without ``BASELINE`` the
subclass does nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from typing import Any

from lmms_eval import models as registry
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger

from llava.adapters.transformers import set_pruning
from llava.pruning import PruningConfig
from lmms_eval_otprune.models import cache_key
from lmms_eval_otprune.models.exit_status import fail_loudly

WRAPPERS = (
    "gemma3",
    "glm4v",
    "huggingface",
    "internvl_hf",
    "llava_hf",
    "mistral3_vl",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
)
"""Ids of wrappers that hold a model of transformers in ``self.model`` and call its ``generate``."""
KINDS = {"simple": "AVAILABLE_SIMPLE_MODELS", "chat": "AVAILABLE_CHAT_TEMPLATE_MODELS"}


def manifests() -> list[ModelManifest]:
    """The wrappers that this release of lmms-eval has, under their own ids: task settings are chosen by id."""
    return [
        ModelManifest(
            model_id=name,
            **{
                f"{kind}_class_path": f"{__name__}.{kind}_{name}" if name in getattr(registry, known) else None
                for kind, known in KINDS.items()
            },
        )
        for name in WRAPPERS
        if any(name in getattr(registry, known) for known in KINDS.values())
    ]


def __getattr__(attribute: str) -> type:
    kind, _, name = attribute.partition("_")
    if kind not in KINDS or name not in WRAPPERS:
        raise AttributeError(attribute)
    return pruned_wrapper(kind, name)


@cache
def pruned_wrapper(kind: str, name: str) -> type:
    """The subclass of lmms-eval's wrapper ``name``, of the kind "simple" or "chat"."""
    path = registry._build_class_path(name, kind, getattr(registry, KINDS[kind])[name])
    module, _, cls = path.rpartition(".")
    wrapped = getattr(importlib.import_module(module), cls)

    class Pruned(wrapped):
        def __init__(self, *args: Any, **kwargs: Any):
            config = PruningConfig.from_env()  # a wrong switch is refused before any weight is read
            super().__init__(*args, **kwargs)
            self._session = None
            if config is not None:
                fail_loudly()
                self._session = set_pruning(self.model, config)
                cache_key.extend_with(self._session.config.fingerprint())
                logger.info(f"{name}: {self._session.config.describe()}")

        def generate_until(self, requests: Iterable[Any]) -> list[Any]:
            return self._reported(super().generate_until(requests))

        def loglikelihood(self, requests: Iterable[Any]) -> list[Any]:
            return self._reported(super().loglikelihood(requests))

        def _reported(self, answers: list[Any]) -> list[Any]:
            """Say how much was kept. Several wrappers log what ``generate`` raises, and go on with an empty answer."""
            session = self._session
            if session is None:
                return answers
            if session.error is not None:
                raise RuntimeError(f"{name}: {session.error}") from session.error
            images, total, kept = session.seen["images"], session.seen["total"], session.seen["kept"]
            if images:
                logger.info(
                    f"{name}: kept {kept / images:.1f} of {total / images:.1f} visual tokens per image "
                    f"({100 * kept / total:.1f} %), {images} images"
                )
            return answers

    Pruned.__name__ = Pruned.__qualname__ = cls
    return Pruned
