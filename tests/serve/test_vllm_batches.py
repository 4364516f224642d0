"""The vision tower never gets more images at once than memory was profiled for, though kept tokens are fewer."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from llava.adapters.vllm.families import FAMILIES
from llava.adapters.vllm.model import PrunedModel


@pytest.mark.parametrize("seed", range(10))
def test_images_are_encoded_in_order_and_in_batches_of_the_profiled_size(seed):
    dice = random.Random(seed)
    sizes = [dice.randint(1, 5) for _ in range(dice.randint(1, 8))]  # tiles
    inputs = {"image_num_patches": torch.tensor(sizes), "pixel_values": torch.arange(sum(sizes))}
    most = dice.randint(1, 200)
    config = SimpleNamespace(image_seq_length=16)
    model = SimpleNamespace(family=FAMILIES["InternVLForConditionalGeneration"], config=config, _tokens_at_once=most)
    batches = list(PrunedModel._batches(model, inputs, len(sizes)))
    assert [i for part, _ in batches for i in range(*part.indices(len(sizes)))] == list(range(len(sizes)))
    assert torch.equal(torch.cat([own["pixel_values"] for _, own in batches]), inputs["pixel_values"])
    assert all(16 * len(own["pixel_values"]) <= most or len(own["image_num_patches"]) == 1 for _, own in batches)
