"""LLaVA with visual token pruning for lmms-eval, registered under the id of the builtin wrapper, ``llava``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> list[ModelManifest]:
    """What lmms-eval's entry point group ``lmms_eval.models`` asks for.

    The id stays ``llava``: task definitions choose generation settings by it.
    """
    from lmms_eval.models.registry_v2 import ModelManifest
    from lmms_eval_otprune.exit_status import fail_loudly, names_our_model

    if names_our_model():
        fail_loudly()
    return [ModelManifest(model_id="llava", simple_class_path="lmms_eval_otprune.llava.Llava")]
