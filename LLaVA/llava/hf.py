"""Models in transformers' own format: telling them from LLaVA's, loading one, and asking it about images."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.files import made_folder, make_once
from llava.model.checkpoint import EMBEDDED_MODEL, is_of_transformers, read_config, resolve_model_path, unreadable

EMBEDDED = f"{EMBEDDED_MODEL}-hf"
"""llava-mini as a model of transformers."""


def path_of(model: str) -> str:
    """What ``from_pretrained`` takes for a model's name: the name, or for "llava-mini-hf" a folder made at first use.

    It lies in ``$LLAVA_MINI_CACHE``, or in the user's cache.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    if model != EMBEDDED or Path(model).is_dir():
        return model
    source = Path(resolve_model_path(EMBEDDED_MODEL))
    content = sha256(b"".join(sha256(file.read_bytes()).digest() for file in _files(source)))
    version = content.hexdigest()[:8]
    folder = made_folder(f"{EMBEDDED}-{version}", EMBEDDED)
    make_once(folder, version, EMBEDDED, lambda building: _export(building / EMBEDDED), ours=True)
    return str(folder / EMBEDDED)


def _files(checkpoint: Path) -> list[Path]:
    """All that an exported folder depends on: the checkpoint, and what exports it."""
    from llava.serve import export_hf

    return [*sorted(file for file in checkpoint.rglob("*") if file.is_file()), Path(export_hf.__file__)]


def _export(folder: Path) -> None:
    from llava.serve.export_hf import export

    export(EMBEDDED_MODEL, folder)


def holds(model: str) -> bool:
    """Whether a folder or hub id holds a model in transformers' own format, and not in LLaVA's.

    Of one that cannot be read it is not known; loading it says why.
    """
    try:
        return is_of_transformers(read_config(resolve_model_path(path_of(model))))
    except (OSError, ValueError):
        return False


def load(model: str, device: str = "cpu", dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """A model, in eval mode, and its processor.

    Raises
    ------
    OSError
        If the checkpoint is missing or cannot be read.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = path_of(model)
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, device_map={"": device})
        return loaded.eval(), AutoProcessor.from_pretrained(path)
    except (RuntimeError, KeyError, EOFError) as error:
        raise unreadable(path, error) from error


def prompt(processor: Any, content: Sequence[str | Image.Image]) -> Any:
    """A question as a model of transformers takes it: arguments of ``generate``, tensors on the host.

    Parameters
    ----------
    processor
        As `load` returns it.
    content : sequence of str or PIL.Image.Image
        The parts of the question, in order.
    """
    images = [part for part in content if not isinstance(part, str)]
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in content
    ]
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    # PaliGemma's is no chat.
    mark = processor.image_token
    return processor(
        images=images,
        text="".join(part if isinstance(part, str) else mark for part in content),
        return_tensors="pt",
    )
