"""What a pruner sees of the vision encoder belongs to the token that it is said to belong to."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

from llava.adapters.transformers import FAMILIES, active_session
from llava.adapters.transformers.encoder import EncoderView
from llava.pruning import PruningConfig, pruning
from tiny_vlms import TINY, Picture, tiny

LOOKING = sorted(name for name in TINY if FAMILIES[tiny(name).model.config.model_type].to_tokens)


@pytest.mark.parametrize("name", LOOKING)
def test_a_token_is_the_mean_of_the_patches_that_it_is_made_from(name):
    """The gradient of a token's features with respect to the patches is nonzero at its own patches alone."""
    model = tiny(name).model
    family, base = FAMILIES[model.config.model_type], model.base_model
    pixels = tiny(name).pixels([[Picture(0, 3), Picture(1, 3)]])
    pruner = SimpleNamespace(needs=frozenset({"encoder_features"}), feature_layer=None)
    view = EncoderView(model, pruner)
    with view.observed() as signals:
        output = base.get_image_features(**pixels, return_dict=True)
    calls = signals["encoder_features"]
    entries = [entry.reshape(-1, entry.shape[-1]) for entry in output.pooler_output]
    place = torch.randint(len(entries[-1]), (), generator=torch.Generator().manual_seed(7))
    if name in ("llava_next", "llava_onevision"):
        place = torch.tensor(3)  # a newline token has no patches
    hidden = [call if call._base is None else call._base for call in calls]  # signals are views: [CLS] cut off
    gradients = torch.autograd.grad(entries[-1][place].square().sum(), hidden)
    strengths = [gradient.abs().sum(dim=-1, keepdim=True).view(-1, *gradient.shape[-2:-1], 1) for gradient in gradients]
    strengths = [strength[:, 1:] if view.has_cls else strength for strength in strengths]
    *others, last = family.to_tokens(base, strengths, entries, pixels)
    assert last[place] > 0
    assert int((last > 0).sum()) == 1 and all(not other.any() for other in others)


@pytest.mark.parametrize(
    ("name", "method", "options", "sentence"),
    [
        (
            "gemma3",
            "visionzip",
            {"importance": "cls"},
            r"ranks by the attention of \[CLS\], and the vision encoder, SiglipVisionModel",
        ),
        ("llava", "hiprune", {"object_layer": 9}, "asks for layer .* of the vision encoder, of which 2 are read"),
        ("qwen2_5_vl", "hiprune", {"object_layer": 2}, "only looks at windows; layers 2 look at the whole image"),
        ("ovis2", "hiprune", {"object_layer": 1}, "not available for ovis2"),
        ("llava", "ocvtp", {}, "asks for layer 2 of the vision encoder, of which 2 are read"),
    ],
)
def test_what_an_encoder_cannot_show_is_refused(name, method, options, sentence):
    model = tiny(name).model
    with pytest.raises(ValueError, match=sentence), pruning(model, method, ratio=0.5, **options):
        pass
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(("name", "source"), [("gemma3", "received"), ("qwen2_vl", "received"), ("llava", "cls")])
def test_importance_is_what_the_encoder_has_and_is_recorded(name, source):
    model = tiny(name).model
    with pruning(model, "fastervlm", ratio=0.5):
        config = active_session(model).config
        assert config.to_dict()["options"] == {"importance": source}
        assert config.describe().endswith(f"(importance={source})")
    with pytest.raises(ValueError, match="must be auto or cls or received, not 'norm'"):
        PruningConfig("fastervlm", 0.5, options={"importance": "norm"})


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_encoder_attention_is_that_of_the_eager_encoder(name):
    """What is read off queries, keys and values is what the eager encoder's maps and projections give."""
    model = tiny(name, "eager").model
    pixels = tiny(name).pixels([[Picture(0)]])
    of_layers = ("received_attention", "layer_cls_attention", "cls_affinity", "value_norms")
    pruner = SimpleNamespace(needs=frozenset({*of_layers, "cls_attention"}), encoder_layers=(0, 1), feature_layer=None)
    view = EncoderView(model, pruner)
    projections = [module for path, module in view.tower.named_modules() if path.endswith("v_proj")]
    values: list[torch.Tensor] = []
    handles = [one.register_forward_hook(lambda module, args, output: values.append(output)) for one in projections]
    with torch.no_grad(), view.observed() as signals:
        model.base_model.get_image_features(**pixels, return_dict=True)
        maps = view.tower(pixels["pixel_values"], output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    for layer in (0, 1):
        heads = values[layer].unflatten(-1, (maps[layer].shape[1], -1))  # (B, T, H, d)
        products = torch.einsum("bhd,bthd->bht", heads[:, 0], heads)
        expected = {
            "received_attention": maps[layer].mean(dim=(1, 2)),
            "layer_cls_attention": maps[layer][:, :, 0].mean(dim=1),
            "cls_affinity": products.softmax(dim=-1).mean(dim=1),
            "value_norms": heads.mean(dim=2).abs().sum(dim=-1),
        }
        for signal in of_layers:
            found = signals[signal][0][..., layer]
            torch.testing.assert_close(found, expected[signal][:, 1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        signals["cls_attention"][0], maps[view.depth - 1][:, :, 0, 1:].transpose(1, 2), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kernel", ["sdpa", "flash_pretended"])
@pytest.mark.parametrize("name", [name for name in LOOKING if name not in ("llava_next", "llava_onevision")])
def test_what_a_patch_receives_does_not_depend_on_the_other_images(name, kernel, monkeypatch):
    """Some encoders pack all images into one sequence, told apart by a mask or, for flash attention, by their edges."""
    AttentionInterface.register("flash_pretended", flash_pretended)
    family = tiny(name)
    tower = family.model.get_encoder("image")
    for module in tower.modules():
        if kernel != "sdpa" and hasattr(module, "config") and getattr(module.config, "_attn_implementation", None):
            monkeypatch.setattr(module.config, "_attn_implementation_internal", kernel)
    pruner = SimpleNamespace(needs=frozenset({"received_attention"}), encoder_layers=(-1,), feature_layer=None)

    def received(*pictures: Picture) -> list[torch.Tensor]:
        model, pixels = family.model, family.pixels([[*pictures]])
        with torch.no_grad(), EncoderView(model, pruner).observed() as signals:
            output = model.base_model.get_image_features(**pixels, return_dict=True)
        entries = [entry.reshape(-1, entry.shape[-1]) for entry in output.pooler_output]
        (calls,) = signals.values()
        return FAMILIES[model.config.model_type].to_tokens(model.base_model, calls, entries, pixels)

    one, two = Picture(0, 1), Picture(1, 2)
    torch.testing.assert_close(torch.cat(received(one, two)), torch.cat([*received(one), *received(two)]))


def flash_pretended(module, query, key, value, attention_mask, *args, cu_seq_lens_q=None, **kwargs):
    """Attention inside each of the sequences that ``cu_seq_lens_q`` tells apart, as flash attention has it."""
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(name, None)
    sdpa = AttentionInterface()["sdpa"]
    edges = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    parts = [slice(*pair) for pair in itertools.pairwise(edges)]
    found = [
        sdpa(module, query[:, :, own], key[:, :, own], value[:, :, own], attention_mask, *args, **kwargs)
        for own in parts
    ]
    return torch.cat([output for output, _ in found], dim=1), None
