"""An exported checkpoint in an engine answers as this package's own LLaVA."""

from __future__ import annotations

import pytest
import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mini.benchmarks.yes_no import pope
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import pruning
from llava.serve.export_hf import main
from served import NEW, Served

QUESTIONS = 8


@pytest.fixture(scope="module")
def conversations():
    rows = [
        (row["image"].convert("RGB"), prompt)
        for task in pope()
        for prompt, row in zip(task.prompts, task.rows, strict=True)
    ]
    return [([image], question) for image, question in rows[:QUESTIONS]]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "llava-mini"
    assert main(["llava-mini", str(folder)]) == 0
    engine = Served(folder)
    yield engine
    engine.close()


@torch.inference_mode()
def own_answers(conversations, method, ratio):
    tokenizer, model, processor, _ = load_pretrained_model(
        "llava-mini", None, "llava-mini", device="cpu", dtype=torch.float32
    )
    answers = []
    for (image,), question in conversations:
        conversation = conv_templates["vicuna_v1"].copy()
        conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        pixels = process_images([image], processor, model.config)
        with pruning(model, method, ratio):
            found = model.generate(
                ids[None], images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=NEW
            )
        (kept,) = [kept for _, kept in model.visual_token_counts]
        answers.append((found[0].tolist(), len(ids) - 1 + kept))
    return answers


METHODS = [("otprune", 0.098), ("downsample", 0.25), ("visionzip", 0.25), ("ocvtp", 0.25), ("scorer", 0.25)]


@pytest.mark.parametrize(("method", "ratio"), METHODS)
def test_answers_and_prompts_are_llavas_own(served, conversations, method, ratio):
    served.use(method)
    found = served.ask(conversations, ratio)
    for one, (tokens, prompt) in zip(found, own_answers(conversations, method, ratio), strict=True):
        assert one.prompt == prompt
        assert one.tokens[: len(tokens)] == tokens
