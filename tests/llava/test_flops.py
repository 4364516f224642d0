"""FLOPs: the literature's figures to the last printed digit, and the exact count against PyTorch's own counter."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig

from golden import golden_root
from llava import flops
from llava.eval.flops.__main__ import main
from llava.flops import SHAPES, Cost, DecoderShape, ModelShape, exact_flops, literature_flops
from llava.model import LlavaConfig, LlavaMistralConfig
from llava.model.visual_cache import VisualCache
from llava.pruning import PruningConfig, kept_count
from tiny_llava import build, pixels, prompt

FILE = golden_root() / "pruning" / "flops_and_log_parser.json"
GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {"find_flop": [], "find_tflop_ratio": [], "report": {}}
VIDEO_TOKENS = [(text, 8 * 144) for text in (28, 63, 21, 38, 196)]

PUBLISHED = {
    "1.5-7b": ("3.2280", "0.5122", "15.63"),
    "1.5-13b": ("6.2813", "1.0020", "15.71"),
    "1.6-7b": ("11.8489", "1.2659", "10.80"),
}
"""TFLOP unpruned, TFLOP pruned and ratio in per cent at a kept ratio of 0.098 (DivPrune, OTPrune)."""


def plain(hidden, intermediate, layers):
    """A decoder without grouped heads."""
    return DecoderShape.llama(hidden, intermediate, layers, query_width=hidden, key_width=hidden, vocabulary=32000)


def averages(shape, cases, ratio, layer=0):
    """Mean unpruned and pruned count and mean ratio over (text, visual) pairs."""
    full, left, ratios = [], [], []
    for text, visual in cases:
        counts = [visual] * layer + [kept_count(visual, ratio)] * (shape.layers - layer)
        tokens = flops.tokens_per_layer(text, counts)
        full.append(literature_flops(shape, [text + visual] * shape.layers))
        left.append(literature_flops(shape, tokens))
        ratios.append(left[-1] / full[-1])
    return [sum(values) / len(cases) for values in (full, left, ratios)]


@pytest.mark.parametrize("case", GOLDEN["find_flop"])
def test_the_formula_gives_the_published_codes_values(case):
    shape = plain(case["hidden"], case["ffn"], case["layers"])
    assert literature_flops(shape, [case["seq_len"]] * case["layers"]) == case["flop"]


@pytest.mark.parametrize("case", GOLDEN["find_tflop_ratio"])
def test_a_drop_at_a_layer_gives_the_published_codes_ratio(case):
    text = case["sequence_len"] - case["total_visual"]
    shape = plain(4096, 11008, case["total_layers"])
    full, left, ratio = averages(shape, [(text, case["total_visual"])], case["subset_ratio"], case["layer"])
    assert [left / 1e12, 100 * ratio, full] == pytest.approx(case["result"], rel=1e-12)


@pytest.mark.parametrize("setting", GOLDEN["report"])
def test_the_averages_are_those_that_the_published_script_prints(setting):
    family, size, kind = setting.split("|")
    cases = list(flops.BENCHMARK_TOKENS.values())
    if family == "llava_1.5":
        cases = [(text, 576) for text, _ in cases]
    if kind == "video":
        cases = VIDEO_TOKENS
    shape = SHAPES[f"{family.removeprefix('llava_')}-{size}"].decoder
    full, left, ratio = averages(shape, cases, 0.1 if kind == "video" else 0.098)
    assert [
        f"avg full TFLOPs: {full / 1e12:.4f}",
        f"avg pruned TFLOPs: {left / 1e12:.4f}",
        f"avg ratio TFLOPs: {100 * ratio:.4f}",
    ] == GOLDEN["report"][setting]


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_command_line_prints_the_papers_averages(model, capsys):
    assert main(["--model", model, "--benchmarks", "--method", "otprune", "--ratio", "0.098"]) == 0
    average = next(line.split() for line in capsys.readouterr().out.splitlines() if "average" in line)
    assert tuple(average[1:4]) == PUBLISHED[model]


def test_withdrawing_every_visual_token_at_layer_4_costs_what_is_published_of_vtw():
    cases = [(text, 576) for text, _ in flops.BENCHMARK_TOKENS.values()]
    _, left, _ = averages(SHAPES["1.5-7b"].decoder, cases, ratio=0, layer=4)
    assert f"{left / 1e12:.3f}" == "0.603"


def test_a_decoder_layer_is_that_of_fitprunes_budget():
    """4 N d^2 + 2 N^2 d + 3 N d m multiply-accumulates, 576 visual tokens in 32 layers (FitPrune's origin_flops)."""
    assert exact_flops(SHAPES["1.5-7b"], [576] * 32).decoder == 2 * 3817152184320


def counted(work, *arguments, **options):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work(*arguments, **options)
    return counter.get_total_flops()


def shape_of(model):
    return ModelShape.of(model.config, model.get_vision_tower().config)


IDS = prompt(5, 7)[None]
TEXT, N = 13, 16

# FlopCounterMode counts matrix products and convolutions, as the formula does; the margin is for what a version of
# transformers may add beside them (rotary angles as a product), and far below one token more or less.
MARGIN = 1e-3


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("mistral", {"attn_implementation": "eager"}),
        ("llama", {"mm_vision_select_feature": "cls_patch"}),  # one more vector for the projector
        ("mistral", {"head_dim": 20}),  # as in some Mistrals: heads times head width is not the hidden size
    ],
)
@pytest.mark.parametrize("layer", [None, 0, 3])
def test_the_exact_count_is_that_of_torch(tower, family, settings, layer):
    """Unpruned (None), pruned before the decoder and at a layer; four query heads on two key heads."""
    model = build(tower, family, **settings)
    n = N + ("mm_vision_select_feature" in settings)
    visual = [n] * 4 if layer is None else [n] * layer + [4] * (4 - layer)
    tokens = flops.tokens_per_layer(TEXT, visual)
    expected = exact_flops(shape_of(model), tokens, logits=tokens[-1])
    model.set_pruning(None if layer is None else PruningConfig("uniform", 0.25, layer))
    assert expected.total == pytest.approx(counted(model, input_ids=IDS, images=pixels(1)), rel=MARGIN)


@pytest.mark.parametrize("kind", ["linear", "identity", "mlp2x_gelu", "mlp3x_gelu"])
def test_tower_and_every_projector_are_counted_apart(tower, kind):
    model = build(tower, mm_projector_type=kind, mm_hidden_size=32, hidden_size=32, num_attention_heads=4)
    expected, encode = exact_flops(shape_of(model), [1] * 4), model.get_vision_tower()
    assert expected.vision_tower == counted(encode, pixels(1))
    assert expected.projector == counted(model.get_model().mm_projector, encode(pixels(1)))


def test_every_crop_of_an_anyres_image_goes_through_the_tower(anyres):
    shape, images, sizes = shape_of(anyres), [pixels(5)], [(112, 112)]
    visual = len(anyres.visual_tokens(images, sizes)[0])
    tokens = [TEXT + visual] * 4
    measured = counted(anyres, input_ids=IDS, images=images, image_sizes=sizes)
    assert shape.crops == 5
    assert exact_flops(shape, tokens, logits=tokens[-1]).total == pytest.approx(measured, rel=MARGIN)


def test_a_text_only_prompt_has_no_crops(model):
    measured = counted(model, input_ids=prompt(8)[None])
    assert exact_flops(shape_of(model), [9] * 4, crops=0, logits=9).total == pytest.approx(measured, rel=MARGIN)


def test_a_generated_token_costs_a_prefill_and_a_remembered_image_no_vision_tower(model):
    model.visual_cache = VisualCache(10**7)
    try:
        first = counted(model.generate, IDS, images=pixels(1), max_new_tokens=1, do_sample=False)
        again = counted(model.generate, IDS, images=pixels(1), max_new_tokens=1, do_sample=False)
    finally:
        model.visual_cache = None
    expected = exact_flops(shape_of(model), [TEXT + N] * 4)
    assert first == pytest.approx(expected.total, rel=MARGIN)
    assert first - again == expected.vision_tower


LARGE = {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
LARGE_TOWER = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, **LARGE)
LLAVA = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "vocab_size": 32000}
SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
ANYRES = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_named_shapes_are_those_of_the_published_configurations(name):
    generation, size = name.split("-")
    config = LlavaConfig(**SIZES[size], **LLAVA, **(ANYRES if generation == "1.6" else {}))
    assert ModelShape.of(config, LARGE_TOWER) == SHAPES[name]
    assert SHAPES[name].visual_tokens == (2880 if generation == "1.6" else 576)


def test_grouped_heads_share_keys_and_values():
    shape = DecoderShape.of(LlavaMistralConfig(**SIZES["7b"], num_key_value_heads=8))
    assert shape.costs[0].linear == 4096 * (4096 + 2 * 1024)


@pytest.mark.parametrize(
    "count", [literature_flops, lambda shape, tokens: exact_flops(ModelShape(shape, Cost(0), Cost(0), 1), tokens)]
)
def test_a_number_of_tokens_is_needed_for_every_layer(count):
    with pytest.raises(ValueError, match=r"32 layers.*not 31"):
        count(SHAPES["1.5-7b"].decoder, [611] * 31)
    with pytest.raises(ValueError, match="at least 0 tokens, not -1"):
        count(SHAPES["1.5-7b"].decoder, [611] * 31 + [-1])


def test_a_configuration_without_a_size_is_refused():
    with pytest.raises(ValueError, match=r"must state intermediate_size.*not None"):
        DecoderShape.of(SimpleNamespace(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=100))


def test_an_unknown_projector_is_refused():
    with pytest.raises(ValueError, match="Unknown projector type: resampler"):
        ModelShape.of(LlavaConfig(mm_projector_type="resampler"), LARGE_TOWER)


def written(tmp_path, *arguments):
    file = tmp_path / "flops.json"
    main([*arguments, "--json", str(file)])
    return json.loads(file.read_text())


def test_the_file_holds_tokens_and_both_counts(tmp_path):
    report = written(tmp_path, "--text", "60", "--method", "uniform", "--ratio", "0.5", "--layer", "2")
    shape, tokens = SHAPES["1.5-7b"], [636] * 2 + [348] * 30
    assert report["tokens_per_layer"] == {"unpruned": [636] * 32, "pruned": tokens}
    assert report["mean_visual_tokens"] == {"unpruned": 576, "pruned": (2 * 576 + 30 * 288) / 32}
    assert report["literature"]["decoder"]["pruned"] == literature_flops(shape.decoder, tokens)
    full = literature_flops(shape.decoder, [636] * 32)
    assert report["literature"]["decoder"]["ratio"] == report["literature"]["decoder"]["pruned"] / full
    for kind, counts in report["tokens_per_layer"].items():
        parts = {part: cost[kind] for part, cost in report["exact"].items()}
        assert parts == exact_flops(shape, counts).to_dict()
    assert report["exact"]["vision_tower"]["ratio"] == 1 > report["exact"]["total"]["ratio"]
    assert report["pruning"]["method"] == "uniform" and report["pruning"]["layer"] == 2


def test_the_table_names_layers_mean_and_conventions(capsys):
    main(["--model", "1.6-7b", "--text", "60", "--method", "uniform", "--ratio", "0.5", "--layer", "2"])
    shown = capsys.readouterr().out
    assert "60 text and 2880 visual tokens, 5 crops" in shown
    assert "0-31: 2940" in shown and "0-1: 2940, 2-31: 1500" in shown
    assert "1530 of 2880 (53.12 %)" in shown
    assert "literature, TMACs" in shown and "exact, TFLOPs" in shown


def test_a_method_that_drops_at_several_layers_is_counted_layer_by_layer(tmp_path):
    """PyramidDrop's published schedule halves the tokens at a quarter, a half and three quarters of the depth."""
    report = written(tmp_path, "--text", "0", "--method", "pyramiddrop", "--option", "schedule=published")
    assert report["tokens_per_layer"]["pruned"] == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8


def test_options_reach_the_method(tmp_path):
    report = written(tmp_path, "--method", "OURS", "--ratio", "0.1", "--option", "gamma=0.5", "--option", "compat=1")
    assert report["pruning"]["method"] == "otprune"
    assert report["pruning"]["options"] | {"gamma": 0.5, "compat": True} == report["pruning"]["options"]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_checkpoint_folder_is_read_for_its_configuration(tower, tmp_path, family):
    model = build(tower, family)
    model.config.save_pretrained(tmp_path)
    assert flops.load_shape(str(tmp_path)) == shape_of(model)


def test_a_folder_without_images_in_its_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(ValueError, match="names no vision tower"):
        flops.load_shape(str(tmp_path))
