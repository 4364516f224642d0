"""Find the vision tower that a checkpoint's configuration names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


def build_vision_tower(
    vision_tower_cfg, folders: Sequence[str] | None = None, hub: Mapping[str, Any] | None = None, **kwargs
) -> CLIPVisionTower:
    """Build the tower named by ``mm_vision_tower`` (or ``vision_tower``) of a configuration.

    The name is taken as a folder relative to the current directory, then as a folder inside the checkpoint, then as a
    hub id of a known publisher; a `ValueError` if it is none of these.

    Parameters
    ----------
    vision_tower_cfg
        Also goes to the tower.
    folders : sequence of str, optional
        The checkpoint's; default: the configuration's ``_name_or_path``.
    hub : mapping, optional
        ``cache_dir``, ``token`` and so on for a hub id.
    **kwargs
        Go to the tower.
    """
    # transformers is imported with the tower, and not where tokens are only selected.
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    if getattr(vision_tower_cfg, "s2", False):
        raise ValueError("s2 is not supported: a vision tower at several scales, which no published checkpoint has")
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    if name is None:
        raise ValueError("The configuration names no vision tower (mm_vision_tower)")
    folders = folders or [getattr(vision_tower_cfg, "_name_or_path", "") or ""]
    for folder in (name, *(os.path.join(each, name) for each in folders)):
        if os.path.isdir(folder):
            return CLIPVisionTower(folder, args=vision_tower_cfg, **kwargs)
    if name.startswith(("openai/", "laion/")) or "ShareGPT4V" in name:
        return CLIPVisionTower(name, args=vision_tower_cfg, hub=hub, **kwargs)
    raise ValueError(
        f"Unknown vision tower: {name} (neither a folder here or in the checkpoint, nor a hub id of openai, laion or "
        "ShareGPT4V)"
    )
