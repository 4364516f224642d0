"""Tiny random models as fixtures, one of each a module; a module that needs them otherwise has its own."""

from __future__ import annotations

import pytest

from tiny_llava import build, save_tower


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> str:
    """The folder of a vision tower: 16 patches, with [CLS]."""
    return save_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def model(tower):
    """A LLaVA-1.5 of four decoder layers."""
    return build(tower)


@pytest.fixture(scope="module")
def anyres(tower):
    """The same with the crops of 1.6: base view, unpadded crops, newline tokens."""
    return build(
        tower,
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )
