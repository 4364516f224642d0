"""Training examples: one image's prompt with many questions packed after it.

All questions about an image begin alike: system text, then the image. That prefix, most of the work, is run once;
after it stand the questions, each seeing the prefix and itself, at the positions that it would have alone. So every
question is trained exactly as if it were asked in a conversation of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mini.forms import FORMS
from llava.mini.pages import Page, render_page
from llava.mini.questions import QA, sample_pair_questions, sample_questions, sample_text_questions
from llava.mini.scenes import GRID, Scene, render, sample_scene
from llava.mini.seeded_random import SeededRandom
from llava.mm_utils import tokenizer_image_token
from mini_training.grounding import COLUMNS, grounding_targets
from mini_training.letter_exercises import sample_letter_exercises
from mini_training.vocabulary import conversation_texts


@dataclass(frozen=True)
class Packed:
    """A prefix and the questions after it, as tokens.

    Attributes
    ----------
    images : ndarray uint8 (I, 336, 336, 3)
        Those that the prefix's image marks stand for; I may be 0.
    prefix : list of int
        With -200 for every image.
    questions, labels : list of list of int
        Each question with its answer; labels are -100 but for the answer.
    forms : list of str
        What kind of question each one is.
    grounding : list of list of tuple of int
        For each question, tokens of it and what they point at: `mini_training.grounding.grounding_targets`.
    patches : list of ndarray bool (576,)
        For each question, the patches of its one image that show the answer; empty where that is not known.
    """

    images: np.ndarray
    prefix: list[int]
    questions: list[list[int]]
    labels: list[list[int]]
    forms: list[str]
    grounding: list[list[tuple[int, ...]]]
    patches: list[np.ndarray] = field(default_factory=list)


def pack(asked: list[QA], scenes: Sequence[Scene | Page], tokenizer) -> Packed:
    """Tokenise questions about the same images as benchmarks will ask them, and cut off what they have in common.

    ``scenes`` are what the images show. A ValueError if an answer does not continue its prompt's tokens, or a question
    ends before its images.
    """
    rows = []
    for qa in asked:
        prompt, whole = conversation_texts(qa, len(scenes))
        prompt_ids, ids = (tokenizer_image_token(text, tokenizer) for text in (prompt, whole))
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(f"the tokens of {prompt!r} change when its answer follows: {whole!r}")
        rows.append((ids, len(prompt_ids)))
    if scenes:
        common = len(rows[0][0]) - rows[0][0][::-1].index(IMAGE_TOKEN_INDEX)
    else:
        shortest = min(length for _, length in rows)
        common = next((i for i in range(shortest) if len({ids[i] for ids, _ in rows}) > 1), shortest - 1)
    prefix = rows[0][0][:common]
    questions, labels, grounding = [], [], []
    for qa, (ids, length) in zip(asked, rows, strict=True):
        if ids[:common] != prefix:
            raise ValueError("questions about the same images must have the same tokens up to the last image")
        questions.append(ids[common:])
        labels.append([IGNORE_INDEX] * (length - common) + ids[length:])
        pieces = tokenizer.convert_ids_to_tokens(ids[common:length])
        things = [shown for shown in scenes if isinstance(shown, Scene)]
        grounding.append(grounding_targets(pieces, things, qa.answer if qa.choices else ""))
    return Packed(_images(scenes), prefix, questions, labels, [qa.form for qa in asked], grounding)


@dataclass(frozen=True)
class Mixture:
    """Which questions a stage asks.

    Attributes
    ----------
    questions : int
        How many about an image, besides a dense caption.
    choice_percent : int
        How many of them come with options.
    plain_percent : int
        How many of the others are asked without a benchmark's wording.
    forms : tuple of str, or None
        The forms to draw from; None for the generator's own mixture.
    dense_percent : int
        How many images come with a dense caption as well.
    pair_every, text_every : int
        One batch in so many asks about two images, or about none; 0 for never.
    letter_exercises : int
        How many exercises (`mini_training.letter_exercises`) are added where there is no image.

    Raises
    ------
    ValueError
        For a number out of range, or an unknown form.
    """

    questions: int = 14
    choice_percent: int = 45
    plain_percent: int = 0
    forms: tuple[str, ...] | None = None
    dense_percent: int = 50
    pair_every: int = 0
    text_every: int = 0
    letter_exercises: int = 0

    def __post_init__(self):
        least = {"questions": 1, "pair_every": 0, "text_every": 0, "letter_exercises": 0}
        for name in ("choice_percent", "plain_percent", "dense_percent", *least):
            value, most = getattr(self, name), math.inf if name in least else 100
            if not isinstance(value, int) or not least.get(name, 0) <= value <= most:
                what = f">= {least[name]}" if name in least else "from 0 to 100"
                raise ValueError(f"{name} must be a whole number {what}, not {value!r}")
        for form in self.forms or ():
            if form not in FORMS:
                raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")


@dataclass(frozen=True)
class Drawn(Dataset):
    """Examples by number: the same number gives the same example, in any process."""

    split: str
    first_seed: int
    length: int

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True)
class PackedScenes(Drawn):
    """Packed examples; the ``batch`` examples of a batch are all of one sort (one image, two, or none)."""

    batch: int
    mixture: Mixture
    tokenizer: PreTrainedTokenizerBase

    def __getitem__(self, number: int) -> Packed:
        seed = self.first_seed + number
        rng = SeededRandom("questions", self.split, seed)
        sort = self._sort(number // self.batch)
        if sort == "text":
            n = self.mixture.questions
            asked = sample_text_questions(rng, n) + sample_letter_exercises(rng, self.mixture.letter_exercises)
            return pack(asked, [], self.tokenizer)
        scene = sample_scene(seed, self.split)
        if sort == "pair":
            other = sample_scene(self.first_seed + self.length + number, self.split)
            asked = sample_pair_questions(scene, other, rng, self.mixture.questions)
            if asked:
                return pack(asked, [scene, other], self.tokenizer)
        mixture = self.mixture
        asked = sample_questions(
            scene, rng, mixture.questions, mixture.forms, mixture.choice_percent, mixture.plain_percent
        )
        if rng.chance(mixture.dense_percent) and all(qa.form != "dense" for qa in asked):
            asked += sample_questions(scene, rng, 1, ("dense",))
        return pack(asked, [scene], self.tokenizer)

    def _sort(self, step: int) -> str:
        mixture = self.mixture
        if mixture.pair_every and step % mixture.pair_every == mixture.pair_every // 2:
            return "pair"
        if mixture.text_every and step % mixture.text_every == mixture.text_every - 1:
            return "text"
        return "scene"


def _images(shown: Sequence[Scene | Page]) -> np.ndarray:
    if not shown:
        return np.zeros((0, 336, 336, 3), np.uint8)
    return np.stack([np.array(render_page(one) if isinstance(one, Page) else render(one)) for one in shown])


class Batch(NamedTuple):
    """Packed examples, padded on the right.

    Attributes
    ----------
    images : Tensor uint8 (I, 336, 336, 3)
    ids : Tensor (B, T), int64
    labels : Tensor (B, T), int64
    segments : Tensor (B, T), int64
        0 for the prefix, 1, 2, ... for the questions, -1 for padding.
    grounding : Tensor (G, 2 + C), int64
        Row, index in ``ids``, and what the token there points at (`mini_training.grounding.COLUMNS`).
    pointers : Tensor (P, 2), int64
        Row and index in ``ids`` of tokens that an answer's token is predicted from.
    patches : Tensor (P, 576), bool
        The patches of the row's image that show that answer.
    """

    images: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor
    grounding: torch.Tensor
    pointers: torch.Tensor
    patches: torch.Tensor


def collate(examples: list[Packed]) -> tuple[Batch]:
    """Stack examples into one batch."""
    ids, labels, segments, grounding = [], [], [], []
    pointers, patches = [], []
    for row, example in enumerate(examples):
        ids.append([*example.prefix, *chain(*example.questions)])
        labels.append([IGNORE_INDEX] * len(example.prefix) + [*chain(*example.labels)])
        numbered = [[number] * len(question) for number, question in enumerate(example.questions, start=1)]
        segments.append([0] * len(example.prefix) + [*chain(*numbered)])
        starts = accumulate(map(len, example.questions), initial=len(example.prefix))
        *starts, _ = starts  # the last one is the end
        for start, targets in zip(starts, example.grounding, strict=True):
            grounding += [(row, start + token, *values) for token, *values in targets]
        for start, answer, shown in zip(starts, example.labels, example.patches, strict=False):
            said = [place for place, label in enumerate(answer) if label != IGNORE_INDEX][:-1]  # without the end
            pointers += [(row, start + place - 1) for place in said if shown.any()]
            patches += [shown for _ in said if shown.any()]
    return (
        Batch(
            torch.from_numpy(np.concatenate([example.images for example in examples])),
            _stacked(ids, 0),
            _stacked(labels, IGNORE_INDEX),
            _stacked(segments, -1),
            torch.tensor(grounding, dtype=torch.int64).view(-1, 2 + len(COLUMNS)),
            torch.tensor(pointers, dtype=torch.int64).view(-1, 2),
            torch.from_numpy(np.array(patches, bool).reshape(-1, GRID * GRID)),
        ),
    )


def _stacked(rows: list[list[int]], filler: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)


def packed_mask(segments: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token sees, (B, 1, T, T), and its position, (B, T); of `Batch.segments`.

    The mask is 0 where a token sees another one (earlier, and of the prefix or of its own segment), else a large
    negative number. Padding sees itself, so that no row of scores is empty. Positions are counted through the prefix,
    and from its end anew in every segment.
    """
    length = segments.shape[1]
    order = torch.arange(length, device=segments.device)
    earlier = order[None, :] <= order[:, None]  # (T, T)
    own = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    seen = earlier & (own | (segments[:, None, :] == 0))
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    mask.masked_fill_(~seen, torch.finfo(dtype).min / 2)
    starts = torch.cat([torch.ones_like(own[:, :1, 0]), segments[:, 1:] != segments[:, :-1]], 1)  # (B, T)
    begins = torch.where(starts, order, 0).cummax(1).values
    prefix = (segments == 0).sum(1, keepdim=True)
    positions = order - begins + torch.where(segments > 0, prefix, 0)
    return mask.unsqueeze(1), positions.clamp_min(0)
