"""Rows of a batch inside a decoder: one `take` for all that goes along the sequence, each row as it would be alone."""

from __future__ import annotations

import random

import pytest
import torch

from llava.pruning.methods.uniform import Uniform
from llava.pruning.reduce import reduce
from llava.pruning.rows import TEXT, KeptColumns, Rows, drop_image_tokens
from llava.pruning.tokens import ImageTokens, VisualTokens


def prompt(rng: random.Random, images: list[int]) -> torch.Tensor:
    """The image number at each position of a row: images of so many tokens, text between, and inside, them."""
    numbers = [TEXT] * rng.randint(0, 3)
    for image, tokens in enumerate(images):
        for _ in range(tokens):
            numbers += [image] + [TEXT] * (rng.random() < 0.1)
        numbers += [TEXT] * rng.randint(1, 3)
    return torch.tensor(numbers)


def batch(rng: random.Random):
    """Rows of different lengths, padded on the left, with sides of two and three axes; and their images."""
    sizes = [[rng.randint(1, 9) for _ in range(rng.randint(0, 3))] for _ in range(3)]
    rows, first = [], 0
    for own in sizes:
        row = prompt(rng, own)
        rows.append(torch.where(row == TEXT, TEXT, row + first))
        first += len(own)
    length = max(map(len, rows)) or 1
    image_id = torch.full((len(rows), length), TEXT)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        image_id[number, length - len(row) :] = row
        valid[number, length - len(row) :] = True
    hidden = torch.arange(3.0 * length).view(3, length, 1)
    sides = {"token_type": image_id + 7, "positions": torch.arange(3 * length * 3).view(3, length, 3)}
    images = [ImageTokens(torch.zeros(n, 1)) for own in sizes for n in own]
    return Rows.start(hidden, valid, image_id, **sides), images


@pytest.mark.parametrize("seed", range(20))
def test_what_stands_along_the_sequence_stays_together(seed):
    start, images = batch(random.Random(seed))
    first = drop_image_tokens(start, images, Uniform(), 0.6, {})
    last = drop_image_tokens(first, images, Uniform(), 0.3, {})
    for rows in (start, first, last):
        column = rows.column[rows.valid]
        row = rows.valid.nonzero()[:, 0]
        for name in ("hidden", "image_id", "original_position", "prompt"):
            assert torch.equal(getattr(rows, name)[rows.valid], getattr(start, name)[row, column])
        for name in start.side:
            assert torch.equal(rows.side[name][rows.valid], start.side[name][row, column])
        assert (rows.image_id[~rows.valid] == TEXT).all() and not rows.prompt[~rows.valid].any()


@pytest.mark.parametrize("seed", range(20))
def test_each_image_keeps_what_it_would_alone(seed):
    start, images = batch(random.Random(seed))
    left = drop_image_tokens(start, images, Uniform(), 0.4, {})
    for number, image in enumerate(images):
        own = left.original_position[left.image_id == number]
        budget = Uniform().kept_count(len(image), 0.4)
        assert own.tolist() == reduce(Uniform(), VisualTokens.of([image], budget)).indices[0].tolist()
    gone = drop_image_tokens(start, images, Uniform(), 0, {})
    assert (gone.image_id == TEXT).all() and torch.equal(gone.text.sum(1), start.text.sum(1))


def test_positions_are_counted_within_an_image_whatever_stands_between():
    image_id = torch.tensor([[TEXT, 0, 0, TEXT, 0, 1, TEXT, 1]])
    rows = Rows.start(torch.zeros(1, 8, 1), image_id > -2, image_id)
    assert rows.original_position.tolist() == [[TEXT, 0, 1, TEXT, 2, 0, TEXT, 1]]


@pytest.mark.parametrize("pad_right", [False, True])
def test_gaps_are_closed_on_the_side_that_is_asked_for(pad_right):
    keep = torch.tensor([[True, False, True, True], [False, True, False, False]])
    columns = KeptColumns.closing_gaps(keep, pad_right)
    values = columns.take(torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]]), 0).tolist()
    assert values == [[10, 12, 13], [21, 0, 0] if pad_right else [0, 0, 21]]
