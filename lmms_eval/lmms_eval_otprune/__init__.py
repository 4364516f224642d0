"""LLaVA with visual token pruning for lmms-eval, registered under the id of the builtin wrapper, ``llava``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> list[ModelManifest]:
    """Entry point of lmms-eval's group ``lmms_eval.models``.

    The id stays ``llava``: task definitions choose generation settings by it.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    from lmms_eval_otprune.models import transformers_models
    from lmms_eval_otprune.models.command_line import check, names_our_model, started_from_command_line
    from lmms_eval_otprune.models.exit_status import fail_loudly

    if started_from_command_line() and names_our_model():
        fail_loudly()
        try:
            check(sys.argv[1:])
        except ValueError as error:
            raise SystemExit(f"llava: {error}") from None
    own = ModelManifest(model_id="llava", simple_class_path="lmms_eval_otprune.models.llava.Llava")
    return [own, *transformers_models.manifests()]
