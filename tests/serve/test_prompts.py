"""Placeholders and positions of prompts whose images lose tokens; none of it needs vLLM."""

from __future__ import annotations

import random

import pytest
import torch

from llava.adapters.vllm.mrope import place, prompt_positions, split, to_columns
from llava.adapters.vllm.placeholders import shortened
from llava.pruning import kept_count
from tiny_vlms import IMAGE, START, Picture, tiny


@pytest.mark.parametrize("seed", range(20))
def test_text_around_placeholders_stays_and_the_count_is_the_pruners(seed):
    dice = random.Random(seed)
    is_embed = [dice.random() < 0.7 for _ in range(dice.randint(1, 40))] + [True]
    tokens = [7 if embed else 100 + place for place, embed in enumerate(is_embed)]
    ratio = dice.choice([1.0, 0.5, 0.098, dice.uniform(0.01, 1)])
    left = shortened(tokens, is_embed, ratio)
    assert [token for token in left if token != 7] == [token for token in tokens if token != 7]
    assert left.count(7) == kept_count(sum(is_embed), ratio)
    assert ratio < 1 or left == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_are_exact_in_every_dtype_of_the_embeddings(dtype):
    columns = to_columns(3, 700).to(dtype)
    embeddings = torch.cat([torch.zeros(2100, 8, dtype=dtype), columns], dim=1)
    line, _ = prompt_positions(2101, [(1, 2100, 3, 700)])
    ids = torch.arange(2101)
    (bare,), offsets = split([embeddings])
    placed = place(line, ids > 0, ids == 0, offsets, 0)
    assert bare.shape == (2100, 8)
    assert torch.equal(placed[1, 1:] - 1, torch.arange(3).repeat_interleave(700))
    assert torch.equal(placed[2, 1:] - 1, torch.arange(700).repeat(3))


@pytest.mark.parametrize("seed", range(10))
def test_positions_are_those_of_the_whole_prompt_however_it_is_cut_into_steps(seed):
    """As transformers numbers Qwen2.5-VL's prompt, less what is dropped: steps begin and end inside images, between
    them, and after a prefix from the cache, whose images are not seen again."""
    dice = random.Random(seed)
    sizes = [dice.randrange(4) for _ in range(dice.randint(1, 3))]
    row = [dice.randint(3, 20)]
    for number, size in enumerate(sizes):
        row += [Picture(number, size), *(dice.randint(3, 20) for _ in range(dice.randint(0, 4)))]
    qwen = tiny("qwen2_5_vl")
    inputs = qwen.inputs([row])
    ids, grids = inputs["input_ids"][0], inputs["image_grid_thw"]
    whole, whole_delta = qwen.model.model.get_rope_index(**{n: inputs[n] for n in inputs if n != "pixel_values"})
    merge = qwen.model.config.vision_config.spatial_merge_size
    keep = (ids != IMAGE) | (torch.rand(len(ids), generator=torch.Generator().manual_seed(seed)) < 0.4)
    images, embeddings, at = [], [], 0
    for _, height, width in grids.tolist():
        rows, columns = height // merge, width // merge
        own = (ids == IMAGE).nonzero().flatten()[at : at + rows * columns]
        at += rows * columns
        keep[own[0]] = True
        kept = keep[own]
        images.append((int(keep[: own[0]].sum()), int(kept.sum()), rows, columns))
        embeddings.append(torch.cat([torch.zeros(len(own), 5), to_columns(rows, columns)], dim=1)[kept])
    ids, wanted = ids[keep], whole[:, 0, keep]
    positions, delta = prompt_positions(len(ids), images)
    text = ids != IMAGE
    assert torch.equal(positions[:, text], wanted[:, text])
    assert delta + len(ids) == int(whole_delta) + len(inputs["input_ids"][0])
    cached = dice.randrange(len(ids)) if seed % 2 else 0
    begin = cached
    while begin < len(ids):
        end = min(len(ids), begin + dice.randint(1, 12))
        parts = []
        for (offset, *_), embedding in zip(images, embeddings, strict=True):
            part = embedding[max(begin - offset, 0) : max(end - offset, 0)]
            parts += [part] if len(part) else []
        if parts:
            positions = place(positions, ~text, ids == START, split(parts)[1], begin)
        begin = end
    assert torch.equal(positions[:, cached:], wanted[:, cached:])
