"""A trained scorer: attention gathered from a model, a network that predicts it, and the method that keeps by it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from llava.fitting.prompts import Prompts
from llava.fitting.scorer.__main__ import main
from llava.fitting.scorer.attention import Attention, gather, text_attention
from llava.fitting.scorer.train import Recipe, collate, evaluate, train
from llava.pruning import PruningConfig, VisualTokens
from llava.pruning.methods.fitprune.recipe import read_recipe
from llava.pruning.methods.scorer import Scorer, TokenScorer, load_scorer, read_scorer_config
from llava.train.loop import Run, read_log
from tiny_llava import build
from tiny_prompts import Words, questions
from tiny_trained import save_tiny_scorer

RECIPE = Recipe(hidden=16, epochs=30, batch=4, learning_rate=1e-2, validation=0.2)


def prompts(model, count: int = 10) -> Prompts:
    return Prompts(questions(count), Words(), model.config)


def gathered(model, folder, count: int = 10):
    gather(model, model.get_vision_tower().image_processor, prompts(model, count), folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def attention(model, tmp_path_factory):
    return gathered(model, tmp_path_factory.mktemp("attention"))


@pytest.fixture(scope="module")
def trained(attention, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer")
    assert train(attention, RECIPE, Run(folder))
    return folder


def test_what_is_gathered_is_the_encoders_features_and_the_decoders_attention(tower, model, attention):
    data = Attention(attention)
    assert len(data) == 10
    features, shares = data[3]
    prompt = prompts(model)[3]
    pixels = model.get_vision_tower().image_processor([prompt.image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(features, model.get_vision_tower()(pixels)[0], rtol=1e-3, atol=1e-3)
    eager = build(tower)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        embeds = eager.prepare_inputs_labels_for_multimodal(prompt.input_ids[None], None, None, None, None, pixels)[4]
        maps = eager.model(inputs_embeds=embeds, output_attentions=True).attentions
    first, n = int((prompt.input_ids < 0).nonzero()), len(shares)
    paid = torch.stack([each[0].amax(0)[first + n :, first : first + n].sum(0) for each in maps])
    torch.testing.assert_close(shares, (paid / paid.sum(1, keepdim=True)).mean(0), rtol=1e-3, atol=1e-5)


def test_gathering_continues_where_it_was_and_does_not_mix(model, attention, tmp_path, monkeypatch):
    gathered(model, tmp_path)
    (tmp_path / "000004.safetensors").unlink()
    with pytest.raises(OSError, match="is not complete: run gather again"):
        Attention(tmp_path)[4]
    sent = []
    monkeypatch.setattr(
        "llava.fitting.scorer.attention.text_attention", lambda *args: sent.append(args) or text_attention(*args)
    )
    gathered(model, tmp_path)
    assert len(sent) == 1
    assert torch.equal(Attention(tmp_path)[4][1], Attention(attention)[4][1])
    with pytest.raises(ValueError, match="of another model, or other data"):
        gathered(model, tmp_path, count=9)


def test_training_learns_and_resumes_to_the_same_weights(attention, trained, tmp_path):
    lines = read_log(trained)
    assert lines[-1]["divergence"] < 0.5 * lines[0]["divergence"]
    for last_step in (1, 7, 30):
        assert not train(attention, RECIPE, Run(tmp_path, resume=True, last_step=last_step))
    assert train(attention, RECIPE, Run(tmp_path, resume=True))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()
    config = json.loads((trained / "config.json").read_text())
    assert config["trained_on"]["model"]["name"] == "tiny" and config["trained_on"]["recipe"]["hidden"] == 16
    with pytest.raises(ValueError, match="10 images are too few: 2 are held out, a step takes 9"):
        train(attention, dataclasses.replace(RECIPE, batch=9), Run(tmp_path / "other"))


def test_a_perfect_scorer_keeps_the_most_attention_there_is():
    """Attention that one feature states."""
    draw = torch.Generator().manual_seed(0)
    data = [(features := torch.randn(40, 3, generator=draw), features[:, 0].softmax(0)) for _ in range(3)]

    class First(torch.nn.Module):
        def forward(self, features):
            return features[..., 0]

    found = evaluate(First(), data)
    assert found["kept_attention"] == pytest.approx(found["most_attention"])
    assert found["random_attention"] == pytest.approx(0.1)


def test_padding_and_newlines_are_no_patches():
    scorer, draw = TokenScorer(8, 6), torch.Generator().manual_seed(1)
    images = [(torch.randn(n, 8, generator=draw), torch.rand(n, generator=draw)) for n in (5, 9)]
    features, attention = collate(images)
    assert features.shape == (2, 9, 8) and attention[0, 5:].eq(0).all()
    scores = scorer(features)
    assert scores[0, 5:].eq(-torch.inf).all()
    torch.testing.assert_close(scores[0, :5], scorer(images[0][0][None])[0])


def test_the_highest_scores_are_kept_or_what_covers_the_image_by_them(tmp_path):
    folder = save_tiny_scorer(tmp_path)
    features = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(2))
    scores, tokens = load_scorer(tmp_path)(features), VisualTokens(torch.zeros(2, 12, 4), 5, encoder_features=features)
    found = Scorer(checkpoint=folder, coverage=False).indices(tokens)
    assert torch.equal(found, scores.topk(5).indices.sort().values)
    unit = torch.nn.functional.normalize(features, dim=-1)
    for image, kept in enumerate(Scorer(checkpoint=folder).indices(tokens).tolist()):
        similarity, share = unit[image] @ unit[image].T, scores[image].softmax(0)
        chosen, served = [], torch.zeros(12)
        for _ in range(5):
            gains = share * (similarity - served[:, None]).clamp_min(0).sum(0)
            gains[chosen] = -1
            chosen.append(int(gains.argmax()))
            served = torch.maximum(served, similarity[:, chosen[-1]])
        assert kept == sorted(chosen)


def test_the_shipped_scorer_is_of_the_weights_that_the_shipped_recipes_are_of():
    """Which a test of the recipes compares with the shipped model's."""
    model = read_scorer_config(Scorer()._folder)["trained_on"]["model"]
    assert model["weights"] == read_recipe("llava-mini/60").metadata["model"]["weights"]


def test_a_scorer_counts_by_its_weights(tmp_path):
    config = PruningConfig("scorer", 0.3, options={"checkpoint": save_tiny_scorer(tmp_path)})
    before = config.fingerprint()
    save_tiny_scorer(tmp_path, seed=23)
    assert config.fingerprint() != before


def test_what_is_no_scorer_of_this_model_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a scorer: it has no config.json"):
        PruningConfig("scorer", 0.3, options={"checkpoint": str(tmp_path / "nowhere")})
    folder = save_tiny_scorer(tmp_path, width=24)
    with pytest.raises(ValueError, match="reads features of width 24, but this vision tower's have 32"):
        model.set_pruning(PruningConfig("scorer", 0.3, options={"checkpoint": folder}))
    (tmp_path / "config.json").write_text('{"model_type": "ocvtp"}')
    with pytest.raises(ValueError, match="does not describe a scorer"):
        PruningConfig("scorer", 0.3, options={"checkpoint": folder})
    (tmp_path / "config.json").write_text('{"model_type": "token_scorer", "width": "wide", "hidden": 3}')
    with pytest.raises(ValueError, match="width must be a whole number >= 1, not 'wide'"):
        PruningConfig("scorer", 0.3, options={"checkpoint": folder})
    save_tiny_scorer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"Cannot read .*model.safetensors"):
        load_scorer(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gather", "--samples", "0"], "at least one sample"),
        (["train", "--attention", "{}"], "holds no attention"),
    ],
)
def test_a_wrong_command_ends_with_one_sentence(arguments, said, tmp_path, capsys):
    assert main([text.format(tmp_path) for text in arguments]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1
