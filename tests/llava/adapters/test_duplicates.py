"""Patches with the same pixels are one token in every family whose tokens lie on a plain grid."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from llava.adapters.transformers import FAMILIES
from llava.adapters.transformers.family import anyres
from llava.pruning import pruning
from tiny_vlms import TINY, Picture, tiny

PLAIN = [name for name in TINY if FAMILIES.get(name, FAMILIES["llava"]).layouts not in (None, anyres)]


@dataclass(frozen=True)
class Plain(Picture):
    """Random pixels, of which the upper ``share`` has one colour."""

    share: float = 1.0

    def pixels(self, *shape: int) -> torch.Tensor:
        drawn = super().pixels(*shape)
        rows = 0 if len(shape) == 2 else -2
        drawn.narrow(rows, 0, round(self.share * shape[rows])).fill_(0.5)
        return drawn


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_one_of_the_tokens_of_one_colour_is_left(name):
    family = tiny(name)
    with pruning(family.model, "otprune", ratio=1.0, drop_duplicates=True) as report:
        rows = [[3, Plain(0, 1), 4], [5, Plain(1, 0, 0.5), 6], [9, 10], [7, Plain(2, 2, 0.0), 8]]
        family.model(**family.inputs(rows))
        counts = report.visual_token_counts
    # Three pictures, or their 3, 1 and 2 tiles where each has a budget of its own.
    (_, uniform), (half, some), (whole, every) = counts if len(counts) == 3 else (counts[0], counts[3], counts[4])
    assert uniform == 1 and 1 < some < half and every == whole


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_other_families_are_refused_in_one_sentence(name):
    with (
        pytest.raises(ValueError, match=f"needs tokens on a plain grid of patches, which those of {name} are not"),
        pruning(tiny(name).model, "otprune", ratio=0.5, drop_duplicates=True),
    ):
        pass
