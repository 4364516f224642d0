"""Fingerprints of everything that an answer depends on, so that answers are reused only where they are valid."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llava
from llava.model.builder import read_config
from lmms_eval_otprune.models.digests import file_digests

PACKAGES = ("torch", "transformers", "tokenizers", "pillow")
"""Packages whose version an answer may depend on."""
_NOT_ANSWERING = ("benchmark_tasks.py", "eval", "fitting", "flops", "mini", "serve", "train")
_CHECKPOINT_FILES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"}


def model_fingerprint(
    pretrained: str, model_base: str | None, dtype: str, attn_implementation: str, conv_template: str
) -> str:
    """All that an answer depends on besides the question and the pruning configuration.

    Parameters
    ----------
    pretrained, model_base : str
        Local folders or Hub ids.
    dtype, attn_implementation, conv_template : str
        Names of the floating type, the attention and the conversation template.

    Returns
    -------
    str
        weights/code/dtype/attention/template/versions
    """
    weights = "+".join(checkpoint_fingerprint(path) for path in (pretrained, model_base) if path)
    versions = ",".join(f"{package}-{version(package)}" for package in PACKAGES)
    return f"{weights}/{code_fingerprint()}/{dtype}/{attn_implementation}/{conv_template}/{versions}"


def code_fingerprint() -> str:
    """Twelve hexadecimal digits of the source files that turn an image and a question into an answer.

    Without it, a changed method or prompt would get the recorded answers of the old one.
    """
    return source_digest(_sources())


def source_digest(files: Iterable[Path]) -> str:
    """Twelve hexadecimal digits of files' names and contents."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _sources() -> Iterator[Path]:
    package = Path(llava.__file__).parent
    yield from sorted(Path(__file__).parent.glob("*.py"))
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).parts
        # FitPrune's recipes are fitted when a model is loaded.
        if inside[0] not in _NOT_ANSWERING or inside[:2] in (("fitting", "fitprune"), ("fitting", "prompts.py")):
            yield path


def checkpoint_fingerprint(checkpoint: str) -> str:
    """Twelve hexadecimal digits that change when the content of a checkpoint or of its vision tower does.

    Parameters
    ----------
    checkpoint : str
        A local folder, or a Hub id, for which the revision counts that would be loaded now. Its configuration is
        downloaded, so that the fingerprint does not change when the weights are.
    """
    tower = _config(checkpoint).get("mm_vision_tower")
    parts = [_content(checkpoint)]
    if isinstance(tower, str):
        inside = os.path.join(checkpoint, tower)
        tower = inside if os.path.isdir(inside) and not os.path.isdir(tower) else tower
        _config(tower)
        parts.append(_content(tower))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _config(checkpoint: str) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return read_config(checkpoint)
    return {}


def _content(checkpoint: str) -> str:
    folder = Path(checkpoint)
    if not folder.is_dir():
        return f"hub:{checkpoint}@{_cached_revision(checkpoint)}"
    files = [path for path in sorted(folder.iterdir()) if path.suffix in _CHECKPOINT_FILES and path.is_file()]
    return "\n".join(f"{path.name} {digest}" for path, digest in zip(files, file_digests(files), strict=True))


def _cached_revision(repository: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):
        found = try_to_load_from_cache(repository, "config.json")
        return Path(found).parent.name if isinstance(found, str) else None
    return None
