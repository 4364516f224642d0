"""The tokenizer of llava-mini: a Llama tokenizer, trained on what the world's questions and captions say."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from llava.conversation import conv_templates
from llava.files import atomic_write, write_json
from llava.mini.captions import CAPTION_PROMPT, COUNT_WORDS, DENSE_PROMPT
from llava.mini.forms.knowledge import FRENCH, FRUITS
from llava.mini.questions import (
    INSUFFICIENT,
    LETTER,
    QA,
    SHORT,
    sample_pair_questions,
    sample_questions,
    sample_text_questions,
)
from llava.mini.scenes import COLORS, NUMBERS, SHAPES, WORDS, sample_scene
from llava.mini.seeded_random import SeededRandom

# The conversation template that benchmarks use with LLaVA-1.5, and so the one to train on.
TEMPLATE = "vicuna_v1"

# A word with the space in front of it, or a mark.
WORD = re.compile(r" ?[A-Za-z]+| ?[^A-Za-z\s]")

_PROMPT = conv_templates[TEMPLATE].copy()
_PROMPT.append_message(_PROMPT.roles[0], "")
# What every prompt holds becomes one piece: the image's tokens are many enough.
PHRASES = (
    f" {_PROMPT.system} {_PROMPT.roles[0]}:",
    f"{SHORT} {_PROMPT.roles[1]}:",
    f"{LETTER} {_PROMPT.roles[1]}:",
    INSUFFICIENT,
    f"{CAPTION_PROMPT} {_PROMPT.roles[1]}:",
    f"{DENSE_PROMPT} {_PROMPT.roles[1]}:",
    " There are several options:",
    "<image 1>",
)
COMMON, RARE = 50, 5

# Scenes of their own, far from those that are trained on.
FIRST_SEED = 900_000_000


def conversation_texts(qa: QA, images: int = 1) -> tuple[str, str]:
    """The prompt that a model gets for a question (with ``<image>`` marks), and the same with the answer."""
    marks = " ".join(["<image>"] * images)
    conversation = conv_templates[TEMPLATE].copy()
    conversation.append_message(conversation.roles[0], f"{marks}\n{qa.prompt}" if images else qa.prompt)
    conversation.append_message(conversation.roles[1], None)
    asked = conversation.get_prompt()
    conversation.messages[-1][-1] = qa.answer
    return asked, conversation.get_prompt()


def corpus(scenes: int) -> Iterator[str]:
    """Pieces of text as they occur in `scenes` scenes' questions: words, marks and, whole, what benchmarks always say.

    A word keeps the space in front of it. Words are repeated, so that all of them are learnt before the long phrases
    that are put together from them.
    """
    for number in range(scenes):
        scene = sample_scene(FIRST_SEED + number, "train")
        other = sample_scene(FIRST_SEED + scenes + number, "train")
        rng = SeededRandom("vocabulary", number)
        questions = [
            *sample_questions(scene, rng, 12),
            *sample_pair_questions(scene, other, rng, 1),
            *sample_text_questions(rng, 1),
        ]
        for qa in questions:
            for text in (qa.prompt, " " + qa.answer):
                yield from WORD.findall(text)
    for phrase in PHRASES:
        yield from WORD.findall(phrase) * COMMON
        yield from [phrase] * RARE
    # However rare a word is in the sample, reading it must not take several pieces.
    for word in (*WORDS, *NUMBERS, *COLORS, *SHAPES, *COUNT_WORDS, *FRUITS.values(), *FRENCH.values()):
        yield from [f" {word}"] * COMMON


def build_tokenizer(folder: Path, pieces: int, scenes: int) -> None:
    """Train the tokenizer and write ``tokenizer.model``, ``tokenizer_config.json`` and ``special_tokens_map.json``.

    SentencePiece byte-pair encoding as Llama's: nothing normalised, bytes for what is unknown, single digits. The
    vocabulary has so many pieces, 3 special ones and 256 bytes included, learnt from so many scenes' questions. The
    same corpus gives the same file.
    """
    model = io.BytesIO()  # a file name would be written into the model
    SentencePieceTrainer.train(
        sentence_iterator=corpus(scenes),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,  # the corpus has the spaces; Llama's convention puts one in front of every text
        split_by_whitespace=False,
        split_by_unicode_script=False,
        max_sentencepiece_length=256,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    atomic_write(folder / "tokenizer.model", model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": 2048,
        "padding_side": "right",
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
