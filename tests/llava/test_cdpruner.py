"""CDPruner: the published order, both sources of relevance, and CLIP's text tower."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from golden import golden_root
from golden_features import draw_features
from llava.conversation import conv_templates
from llava.model.llava_arch import greedy_select
from llava.model.multimodal_encoder.clip_text import ClipText, question_text
from llava.pruning import VisualTokens
from llava.pruning.methods.cdpruner import CDPruner, conditional_kernel, min_max
from llava.pruning.similarity import cosine_similarity, text_similarity
from tiny_llava import save_tower

FILE = golden_root() / "pruning" / "attention_methods.json"
GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {}
CASES = [pytest.param(case, id=case["key"]) for case in GOLDEN.get("cdpruner", [])]
KINDS = {"g": "gaussian", "c": "clustered"}


def checked(array, sha):
    assert hashlib.sha256(array.tobytes()).hexdigest() == sha
    return torch.from_numpy(array)


def golden_tokens(case):
    """A golden case as a pruner sees it; the published code scales relevance over the whole batch, so do its inputs."""
    number, batch = int(case["key"][-1]), case["B"]
    seeds = [GOLDEN["base_seed"] + 100 + 10 * number + row for row in range(batch)]
    features = np.stack([draw_features(KINDS[case["features"]], seed, 576, case["D"]) for seed in seeds])
    draw = np.random.default_rng([GOLDEN["base_seed"], 6, number])
    images = draw.standard_normal((batch, 576, 24)).astype(np.float32)
    texts = draw.standard_normal((case["M"], 24)).astype(np.float32)
    similarity = text_similarity(checked(images, case["sha_img"]), checked(texts, case["sha_txt"]))
    return VisualTokens(checked(features, case["sha_f"]), case["T"], text_similarity=similarity)


def stored(case, name):
    return np.load(FILE.with_suffix(".npz"))[f"{case['key']}/{name}"]


def scene(batch=2, n=36, k=9, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, n, 16, generator=draw).to(dtype)
    question = tuple(torch.randn(3 + row, 16, generator=draw).to(dtype) for row in range(batch))
    similarity = torch.rand(batch, n, generator=draw) * 0.2
    return VisualTokens(features, k, question=question, text_similarity=similarity)


@pytest.mark.parametrize("case", CASES)
def test_the_order_is_the_published_one_while_it_means_something(case):
    """Beyond the kernel's rank the published code repeats itself and keeps too few; here as many as asked for."""
    tokens = golden_tokens(case)
    relevance = min_max(-tokens.text_similarity.reshape(1, -1)).reshape(case["B"], 576)
    kernel = conditional_kernel(cosine_similarity(tokens.features), relevance)
    found = greedy_select(kernel, case["T"])
    for row, reliable in enumerate(case["reliable_prefix"]):
        assert found[row, :reliable].tolist() == stored(case, "order")[row, :reliable].tolist()
        assert len(set(found[row].tolist())) == case["T"]


@pytest.mark.parametrize("case", CASES)
def test_the_choice_is_the_published_one_where_it_means_something(case):
    """The published batch is the crops of one image, which share the scale of their relevance."""
    tokens, batch, reliable = golden_tokens(case), case["B"], case["reliable_prefix"][0]
    assert set(case["reliable_prefix"]) == {reliable}
    image = VisualTokens(
        tokens.features.flatten(0, 1)[None],
        batch * reliable,
        crops=torch.arange(batch).repeat_interleave(576)[None],
        text_similarity=tokens.text_similarity.flatten()[None],
    )
    chosen = CDPruner(per_crop=True).indices(image)[0]
    for row in range(batch):
        own = chosen[chosen // 576 == row] - 576 * row
        if reliable == case["T"]:
            assert own.tolist() == np.unpackbits(stored(case, "mask")[row])[:576].nonzero()[0].tolist()
        else:
            assert own.tolist() == sorted(stored(case, "order")[row, :reliable].tolist())


@pytest.mark.parametrize("relevance", ["clip", "embeddings"])
class TestBothSourcesOfRelevance:
    def test_the_needs_are_those_of_the_source(self, relevance):
        assert (
            CDPruner(relevance=relevance).needs == {"clip": {"text_similarity"}, "embeddings": {"question"}}[relevance]
        )

    @pytest.mark.parametrize("content", ["zeros", "duplicates", "one in two"])
    def test_pictures_without_content(self, relevance, content):
        tokens = scene(k=30)
        for value in (tokens.features, tokens.text_similarity):
            if content == "one in two":
                value[:, 1::2] = value[:, ::2]
            else:
                value[:] = 0 if content == "zeros" else value[:, :1].clone()
        chosen = CDPruner(relevance=relevance).indices(tokens)
        assert all(len(set(row)) == 30 for row in chosen.tolist())
        if content == "one in two":
            distinct = CDPruner(relevance=relevance).select(dataclasses.replace(tokens, k=10))
            assert all(len({index // 2 for index in row}) == 10 for row in distinct.tolist())


class TestRelevance:
    def test_clip_prefers_what_is_least_like_the_text(self):
        tokens = VisualTokens(torch.eye(4)[None], 2, text_similarity=torch.tensor([[0.25, 0.1, 0.2, 0.3]]))
        assert CDPruner().select(tokens).tolist() == [[1, 2]]

    def test_embeddings_prefer_what_is_most_like_the_question(self):
        question = torch.tensor([[0.1, 0.9, 0.3, 0.0], [0.1, 0.8, 0.5, 0.0]])
        tokens = VisualTokens(torch.eye(4)[None], 2, question=(question,))
        assert CDPruner(relevance="embeddings").select(tokens).tolist() == [[1, 2]]

    def test_without_a_question_only_diversity_counts(self):
        features = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1.0, 0], [0, 0.9, 0.1], [0, 0, 1.0]])[None]
        nothing = torch.empty(0, 3)
        asked = VisualTokens(features, 3, question=(nothing,))
        constant = VisualTokens(features, 3, text_similarity=torch.full((1, 5), 0.2))
        assert CDPruner(relevance="embeddings").indices(asked).tolist() == [[0, 2, 4]]
        assert CDPruner().indices(constant).tolist() == [[0, 2, 4]]

    @pytest.mark.parametrize("relevance", ["clip", "embeddings"])
    def test_crops_of_an_image_share_its_scale(self, relevance):
        pruner, others = CDPruner(relevance=relevance, per_crop=True), 0
        for seed in range(5):
            tokens = dataclasses.replace(scene(1, seed=seed), crops=torch.arange(36)[None] // 18, k=12)
            tokens.text_similarity[:, 18:] *= 0.2
            scale = min_max(pruner._relevance(tokens))
            expected, apart = [], []
            for crop in (torch.arange(18), torch.arange(18, 36)):
                part = tokens.at(0, crop, 6)
                kernel = conditional_kernel(cosine_similarity(part.features), scale[:, crop])
                expected += sorted((greedy_select(kernel, 6)[0] + int(crop[0])).tolist())
                apart += sorted((CDPruner(relevance=relevance).select(part)[0] + int(crop[0])).tolist())
            assert pruner.indices(tokens)[0].tolist() == expected
            others += expected != apart
        assert others  # a scale of each crop's own chooses otherwise

    def test_it_is_scaled_in_every_image(self):
        scaled = min_max(torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]]))
        torch.testing.assert_close(scaled, torch.tensor([[5e-7, 0.5, 1.0], [1.0, 1.0, 1.0]]))

    def test_another_source_is_refused(self):
        with pytest.raises(ValueError, match="must be 'clip' or 'embeddings', not 'bert'"):
            CDPruner(relevance="bert")


class TestQuestion:
    @pytest.mark.parametrize("template", sorted(conv_templates))
    def test_is_found_in_every_template(self, template):
        conversation = conv_templates[template].copy()
        user, assistant = conversation.roles
        conversation.append_message(user, "<image>\nWhat is it?")
        assert question_text(conversation.get_prompt().split("<image>", 1)[1]) == "What is it?"
        conversation.append_message(assistant, None)
        assert question_text(conversation.get_prompt().split("<image>", 1)[1]) == "What is it?"

    @pytest.mark.parametrize("template", sorted(set(conv_templates) - {"plain", "v0_plain"}))
    def test_is_the_last_one_of_a_dialogue(self, template):
        conversation = conv_templates[template].copy()
        user, assistant = conversation.roles
        for role, words in ((user, "<image>\nWhat is it?"), (assistant, "A cube."), (user, "Of what: wood?")):
            conversation.append_message(role, words)
        conversation.append_message(assistant, None)
        assert question_text(conversation.get_prompt().split("<image>", 1)[1]) == "Of what: wood?"

    def test_is_found_where_special_tokens_are_gone(self):
        assert question_text("\nWhat is it?assistant\n") == "What is it?"
        assert question_text("\nWhat is it? ASSISTANT:") == "What is it?"

    def test_is_all_there_is_without_marks(self):
        assert question_text(" Is the assistant red? ") == "Is the assistant red?"
        assert question_text("") == ""


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP of two layers with a tokenizer of single characters, in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {
        token: index for index, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters), *marks])
    }
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[])
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    first, last = (vocabulary[mark] for mark in marks)
    text = {"vocab_size": len(vocabulary), "bos_token_id": first, "eos_token_id": last, "pad_token_id": last}
    vision = {"image_size": 56, "patch_size": 14}
    torch.manual_seed(3)
    model = CLIPModel(CLIPConfig(text_config=layers | text, vision_config=layers | vision, projection_dim=24)).eval()
    for norm in (model.vision_model.post_layernorm, model.text_model.final_layer_norm):
        torch.nn.init.normal_(norm.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


class TestClipText:
    @pytest.mark.parametrize("text", ["a red cube", "What is it?", ""])
    def test_a_short_text_is_embedded_as_clip_does(self, clip, text):
        folder, model, tokenizer = clip
        with torch.no_grad():
            inputs = tokenizer(text, return_tensors="pt")
            expected = model.text_projection(model.text_model(**inputs).pooler_output)
        torch.testing.assert_close(ClipText(str(folder)).embed_text(text), expected)

    def test_patches_are_projected_as_clip_does_with_cls(self, clip):
        folder, model, _ = clip
        pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            hidden = model.vision_model(pixels).last_hidden_state
            expected = model.visual_projection(model.vision_model(pixels).pooler_output)
        torch.testing.assert_close(ClipText(str(folder)).embed_patches(hidden)[:, 0], expected)

    def test_a_long_text_is_cut_into_segments_of_77_with_marks_of_their_own(self, clip):
        folder, _, tokenizer = clip
        text, scorer = "red cube, " * 30, ClipText(str(folder))
        segments = scorer.segments(text)
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert [len(segment) for segment in segments] == [77, 77, 77, len(plain) - 3 * 75 + 2]
        assert [piece for segment in segments for piece in segment[1:-1]] == plain
        assert {(segment[0], segment[-1]) for segment in segments} == {(tokenizer.bos_token_id, tokenizer.eos_token_id)}
        assert scorer.embed_text(text).shape == (4, 24)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_similarity_is_the_mean_cosine_over_the_segments(self, clip, dtype):
        scorer = ClipText(str(clip[0]))
        hidden = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
        text = "red cube, " * 30
        found = scorer.similarity(hidden, text)
        patches = scorer.embed_patches(hidden.float())
        cosines = [torch.cosine_similarity(patches, piece, dim=-1) for piece in scorer.embed_text(text)]
        assert found.shape == (2, 16) and found.dtype == torch.float32
        torch.testing.assert_close(found, torch.stack(cosines).mean(dim=0), rtol=1e-5, atol=1e-6)

    def test_a_tower_of_vision_alone_is_refused(self, tmp_path):
        folder = save_tower(tmp_path)
        with pytest.raises(ValueError, match=rf"{folder}.*CDPRUNER_RELEVANCE=embeddings"):
            ClipText(folder)

    def test_weights_of_vision_alone_are_refused(self, clip, tmp_path):
        for file in clip[0].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = load_file(tmp_path / "model.safetensors")
        vision = {name: value for name, value in weights.items() if not name.startswith("text")}
        save_file(vision, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{tmp_path}.*weights lack text"):
            ClipText(str(tmp_path))

    def test_a_folder_without_a_tokenizer_is_refused(self, clip, tmp_path):
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((clip[0] / name).read_bytes())
        with pytest.raises(ValueError, match=rf"{tmp_path}.*no tokenizer"):
            ClipText(str(tmp_path))

    def test_a_folder_that_is_not_there_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="nowhere"):
            ClipText(str(tmp_path / "nowhere"))
