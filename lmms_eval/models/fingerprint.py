"""A short name for the weights behind a path, so that answers of one checkpoint are never taken for another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import llava

_SAMPLE = 1 << 16


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
    """
    weights = "+".join(checkpoint_fingerprint(path) for path in (pretrained, model_base) if path)
    return f"{weights}/{code_fingerprint()}/{dtype}/{attn_implementation}/{conv_template}"


def code_fingerprint() -> str:
    """Twelve hexadecimal digits of the source files that turn a picture and a question into an answer.

    Whoever changes a method would otherwise be shown the answers of the old one.
    """
    package = Path(llava.__file__).parent
    digest = hashlib.sha256()
    folders = ("model/**/*.py", "pruning/**/*.py", "eval/fitprune/**/*.py")
    for path in sorted([*package.glob("*.py"), *(path for folder in folders for path in package.glob(folder))]):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def checkpoint_fingerprint(checkpoint: str) -> str:
    """Twelve hexadecimal digits that change when a local checkpoint's files do.

    Parameters
    ----------
    checkpoint : str
        A local folder, or a Hub id. Of each file of a folder the name, the size, and the first, middle and last 64 KiB
        count (reading all of 14 GB would take longer than many runs); a Hub id stands for the revision in the local
        cache, and only for its own name where there is none.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return _short(f"hub:{checkpoint}@{_cached_revision(checkpoint)}".encode())
    digest = hashlib.sha256()
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:12]


def _cached_revision(repository: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, "config.json")
    except ValueError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
