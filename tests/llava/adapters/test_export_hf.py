"""An exported checkpoint in transformers' own LLaVA gives this package's ids, pixels, kept tokens and logits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from golden import golden_root
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import choose_conv_mode, conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, available_methods, pruning
from llava.pruning.signals import ENCODER_SIGNALS
from llava.serve.export_hf import main
from tiny_methods import OPTIONS, TWICE

ROOT = golden_root() / "llava"
CHECKPOINTS = json.loads((ROOT / "manifest.json").read_text())["checkpoints"]
NAMES = [
    name
    for name in ("llava-v1.5-tiny", "llava-v1.5-tiny-lora", "llava-v1.6-vicuna-tiny", "llava-v1.6-mistral-tiny")
    if (ROOT / CHECKPOINTS[name]["path"]).exists()
]
QUESTION = "What is  shown in the image?"
TRAINED = ("ocvtp", "scorer")
"""Their networks belong to one tower."""
BEFORE = [
    name
    for name, info in available_methods().items()
    if info.where.startswith("before") and info.needs <= {"image_keys"} | ENCODER_SIGNALS and name not in TRAINED
]
METHODS = [PruningConfig(name, 0.3, options=OPTIONS.get(name, {})) for name in BEFORE] + [
    PruningConfig("otprune", 0.3, layer=1),
    PruningConfig("downsample", 0.3, layer=1),
    PruningConfig("fastv", 0.3, layer=1),
    PruningConfig("dart", 0.3, layer=1),
    PruningConfig("vscan", 0.3, options=TWICE),
    PruningConfig("dart", 0.3, options={"embeddings": True}),
    PruningConfig("pyramiddrop", 0.6),
    PruningConfig("sparsevlm", 0.6),
    PruningConfig("vtw", 0.6),
]


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    """One checkpoint here and there, in float32, and the mode of its conversations."""
    spec, folder = CHECKPOINTS[request.param], tmp_path_factory.mktemp("exported") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # checkpoints name their vision towers relative to it
        base = [] if spec["model_base"] is None else ["--model-base", spec["model_base"]]
        mode = choose_conv_mode(spec["model_name"], None)
        assert main([spec["path"], str(folder), *base]) == 0
        own = load_pretrained_model(
            spec["path"], spec["model_base"], spec["model_name"], device="cpu", dtype=torch.float32
        )
    return own, (AutoProcessor.from_pretrained(folder), _exported(folder)), mode


def _exported(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(pair, size=(90, 60)):
    """The same question here and there: (ids, pixels) and the processor's output."""
    (tokenizer, model, image_processor, _), (processor, _), mode = pair
    noise = np.random.default_rng(3).integers(0, 255, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    conversation = conv_templates[mode].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{QUESTION}")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    pixels = process_images([image], image_processor, model.config)[0]
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return (ids, pixels), processor(images=image, text=text, return_tensors="pt"), size


def test_ids_and_pixels_are_llavas_own(pair):
    (ids, pixels), exported, _ = inputs_of(pair)
    image_token = pair[1][1].config.image_token_id
    found = exported["input_ids"][0].tolist()
    once = [i for place, i in enumerate(found) if i != image_token or found[place - 1] != image_token]
    assert [IMAGE_TOKEN_INDEX if i == image_token else i for i in once] == ids.tolist()
    # transformers resizes with torchvision, LLaVA with Pillow: one or two grey levels apart.
    torch.testing.assert_close(exported["pixel_values"][0], pixels, rtol=0, atol=2.5 / 255 / 0.26)


@pytest.mark.parametrize("method", [None, *METHODS], ids=lambda method: method and method.describe())
@torch.no_grad()
def test_logits_and_counts_are_llavas_own(pair, method):
    (ids, _), exported, size = inputs_of(pair)
    (_, own, _, _), (_, other), _ = pair
    images = [exported["pixel_values"][0]]

    def both():
        here = own(ids[None], images=images, image_sizes=[size]).logits[0, -1]
        there = other(**exported).logits[0, -1]
        return here, there[: len(here)]

    if method is None:
        here, there = both()
    else:
        with pruning(own, method) as mine, pruning(other, method) as theirs:
            here, there = both()
            assert list(mine.visual_token_counts) == theirs.visual_token_counts
            assert mine.latest_prefill.tokens_left(0).tolist() == theirs.kept[0].tolist()
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_recipe_of_fitprune_keeps_llavas_own(pair, tmp_path):
    """What leaves a layer after its attention there leaves at the next layer's input here: the same numbers."""
    (ids, _), exported, size = inputs_of(pair)
    (_, own, _, _), (_, other), _ = pair
    layers = own.config.num_hidden_layers
    recipe = {"format": 1, "model": {"name": "tiny", "layers": layers, "visual_tokens": None}, "tokens": 16}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"deleted": [5, *[3] * (layers - 2), 0]}))
    config = PruningConfig("fitprune", options={"recipe": str(tmp_path / "recipe.json")})
    with pruning(own, config), pruning(other, config):
        here = own(ids[None], images=[exported["pixel_values"][0]], image_sizes=[size]).logits[0, -1]
        torch.testing.assert_close(other(**exported).logits[0, -1][: len(here)], here, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(90, 60), (60, 200), (56, 56)])
@pytest.mark.parametrize("layer", [0, 1])
def test_answers_are_llavas_own(pair, layer, size):
    (ids, _), exported, _ = inputs_of(pair, size)
    (_, own, _, _), (_, other), _ = pair
    length = exported["input_ids"].shape[1]
    with pruning(own, "otprune", ratio=0.2, layer=layer), pruning(other, "otprune", ratio=0.2, layer=layer):
        here = own.generate(
            ids[None], images=[exported["pixel_values"][0]], image_sizes=[size], max_new_tokens=5, do_sample=False
        )
        there = other.generate(**exported, max_new_tokens=5, do_sample=False)[:, length:]
    assert there.tolist() == here.tolist()


def test_the_embedded_model_is_asked_as_it_was_trained_and_its_weights_have_published_names(tmp_path):
    assert main(["llava-mini", str(tmp_path / "out")]) == 0
    with safe_open(tmp_path / "out/model.safetensors", "pt") as weights:
        names = {name.partition(".layers.")[0] for name in weights.keys()}  # noqa: SIM118
    published = {"language_model.model", "language_model.lm_head.weight", "vision_tower.vision_model.encoder"}
    assert published <= names
    asked = AutoProcessor.from_pretrained(tmp_path / "out").apply_chat_template([{"role": "user", "content": "Why?"}])
    assert conv_templates["vicuna_v1"].system in asked


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere-at-all", "{out}", "--conv-mode", "vicuna_v1"], "nowhere-at-all"),
        (["llava-mini", "{full}"], "is not empty"),
        (["llava-mini", "{out}", "--conv-mode", "llava_v0"], "conversation mode 'llava_v0' cannot be written"),
        (["llava-mini", "{out}", "--conv-mode", "nonsense"], "unknown conversation mode 'nonsense'"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(arguments, sentence, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"out": tmp_path / "out", "full": tmp_path / "full"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1] and not (tmp_path / "out").exists()
