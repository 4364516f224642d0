"""FitPrune in a model: the published mathematics, recipes, and what a decoder with a recipe computes."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from golden import golden_root
from llava import flops
from llava.constants import IGNORE_INDEX
from llava.eval.flops.__main__ import main as flops_command
from llava.fitting.fitprune.search import Found, Walk, search, visual_flops
from llava.flops import SHAPES, ModelShape, exact_flops
from llava.model.language_model.kv_cache import CACHE
from llava.model.language_model.observed_attention import observed_attention
from llava.pruning import PruningConfig, VisualTokens, pruning
from llava.pruning.methods.fitprune.pruner import FitPrune, deletable, expendable, importance
from llava.pruning.methods.fitprune.recipe import Recipe, known_recipes, parse_recipe, read_recipe
from tiny_llava import build, pixels, prompt

FILE = golden_root() / "pruning" / "fitprune.json"
GOLDEN = json.loads(FILE.read_text())
SYSTEM, VISUAL, DEPTH = 35, 576, 32
SAMPLES = range(3)

N, LAYERS = 16, 4
DELETED = (4, 5, 2, 1)
ENTERING, BEHIND = (16, 12, 7, 5), (12, 7, 5, 4)


@cache
def arrays():
    return np.load(FILE.with_suffix(".npz"))


def golden_cases(kind: str, array: str) -> list[str]:
    """The cases of a kind that this copy of the golden data holds; the small one has a few of each."""
    return [key.rpartition("/")[0] for key in arrays() if key.startswith(f"{kind}/") and key.endswith(f"/{array}")]


@cache
def golden_maps(sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys (32, L, 2, 8) of a sample, checked against their digests."""
    base, length = GOLDEN["base_seed"], SYSTEM + VISUAL + GOLDEN["text_len"][sample]
    weight = np.random.default_rng([base, sample, 999]).standard_normal(VISUAL)
    queries, keys = [], []
    for layer in range(DEPTH):
        draw = np.random.default_rng([base, sample, layer])
        q, k = draw.standard_normal((length, 2, 8)), draw.standard_normal((length, 2, 8))
        q[:, :, 0] = 2
        k[:, :, 0] *= 0.5
        k[SYSTEM : SYSTEM + VISUAL, :, 0] += (weight * (0.5 + layer / 31) * 1.5)[:, None]
        queries.append(q.astype(np.float32))
        keys.append(k.astype(np.float32))
    found = []
    for name, value in (("Q", np.stack(queries)), ("K", np.stack(keys))):
        assert hashlib.sha256(value.tobytes()).hexdigest() == GOLDEN["inputs_sha256"][f"sample{sample}/{name}"]
        found.append(torch.from_numpy(value))
    return found[0], found[1]


def received(sample: int, layer: int, alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the visual tokens that are left receive from each other (a mean) and from the text (a sum)."""
    queries, keys = golden_maps(sample)
    text = GOLDEN["text_len"][sample]
    places = torch.cat([torch.arange(SYSTEM), SYSTEM + alive, SYSTEM + VISUAL + torch.arange(text)])
    q, k = queries[layer, places].transpose(0, 1), keys[layer, places].transpose(0, 1)
    logits = q @ k.mT / 8**0.5
    logits = logits.masked_fill(torch.ones(logits.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    strongest = logits.softmax(dim=-1).amax(dim=0)
    visual = slice(SYSTEM, SYSTEM + len(alive))
    return strongest[visual, visual].mean(dim=0), strongest[visual.stop :, visual].sum(dim=0)


@cache
def unpruned(sample: int) -> list[tuple[float, float]]:
    sums = [received(sample, layer, torch.arange(VISUAL)) for layer in range(DEPTH)]
    return [(float(visual.sum()), float(text.sum())) for visual, text in sums]


@cache
def golden_walk(alpha: float) -> tuple[Walk, list[list[torch.Tensor]]]:
    """Three samples through 32 layers, and the survivors of each."""
    tokens, squares, survivors = np.zeros(DEPTH + 1, int), np.zeros(DEPTH + 1, int), []
    for sample in SAMPLES:
        alive, kept, own = torch.arange(VISUAL), [VISUAL], []
        for layer in range(DEPTH):
            alive = alive[~deletable(*received(sample, layer, alive), unpruned(sample)[layer], alpha)]
            kept.append(len(alive))
            own.append(alive)
        tokens += kept
        squares += np.square(kept)
        survivors.append(own)
    return Walk(len(SAMPLES), tokens.tolist(), squares.tolist()), survivors


def unpacked(mask: np.ndarray, sample: int) -> list[int]:
    """The visual tokens in a packed mask over a sample's sequence."""
    whole = np.unpackbits(mask)[: SYSTEM + VISUAL + GOLDEN["text_len"][sample]]
    return np.flatnonzero(whole[SYSTEM : SYSTEM + VISUAL]).tolist()


class TestGolden:
    @pytest.mark.parametrize("sample", SAMPLES)
    def test_unpruned_statistics_are_the_published_ones(self, sample):
        text = GOLDEN["text_len"][sample]
        visual, cross = np.array(unpruned(sample)).T
        # float32 sums of 576 numbers in another order
        np.testing.assert_allclose(visual, arrays()["weightsum_self"][sample], rtol=1e-5)
        np.testing.assert_allclose(cross / text, arrays()["weightsum_cross"][sample], rtol=1e-5)

    @pytest.mark.parametrize("alpha", GOLDEN.get("fixed_alpha", {}))
    def test_a_walk_leaves_what_the_published_one_leaves(self, alpha):
        walk, survivors = golden_walk(float(alpha))
        scheme = Found(float(alpha), walk, DEPTH).scheme
        # A threshold is crossed by a float sum; and once a token or two are left, the published code repeats the
        # number that the sample before deleted.
        np.testing.assert_allclose(scheme, arrays()[f"fixed_alpha/{alpha}/scheme"], atol=1)
        for sample, layers in enumerate(survivors):
            masks = arrays()[f"fixed_alpha/{alpha}/sample{sample}/kept_after_layer"]
            for alive, mask in zip(layers, masks, strict=True):
                assert len(set(alive.tolist()) ^ set(unpacked(mask, sample))) <= 2

    @pytest.mark.parametrize("ratio", GOLDEN.get("search", {}))
    def test_the_search_is_the_published_one_and_ends_at_the_smallest_feasible_alpha(self, ratio):
        logged, cost, share = [], visual_flops(SHAPES["1.5-7b"].decoder), 1 - float(ratio)

        def walk_at(alpha: float) -> Walk:
            walk, _ = golden_walk(alpha)
            stop = walk.stop(cost, share)
            found = Found(alpha, walk, DEPTH if stop is None else stop)
            logged.append({"alpha": alpha, "flops_reach": stop is not None, "scheme": found.scheme})
            return walk

        found = search(walk_at, cost, share)
        expected = GOLDEN["search"][ratio]
        assert logged == expected["steps"]
        assert found.alpha == expected["smallest_feasible_alpha"]
        assert found.scheme == next(step["scheme"] for step in logged if step["alpha"] == found.alpha)

    @pytest.mark.parametrize("case", GOLDEN.get("rest_flops", {}))
    def test_the_budget_is_counted_as_published(self, case):
        cost = visual_flops(SHAPES["1.5-7b"].decoder)
        tokens, layer = map(int, case.split(","))
        rest = cost.rest * tokens + (DEPTH - 1 - layer) * cost.layer(tokens, tokens**2)
        assert rest == GOLDEN["rest_flops"][case]
        assert Walk.of([VISUAL] * (DEPTH + 1)).unpruned(cost) == GOLDEN["origin_flops"]

    @pytest.mark.parametrize("case", golden_cases("inference", "deleted_visual_idx_in_order"))
    def test_the_least_important_tokens_leave_in_the_published_order(self, case):
        sample, layer = (int(re.sub(r"\D", "", part)) for part in case.split("/")[1::2])
        visual, text = received(sample, layer, torch.arange(VISUAL))
        expected = arrays()[f"{case}/deleted_visual_idx_in_order"].astype(int).tolist()
        assert importance(visual, text).argsort(stable=True)[: len(expected)].tolist() == expected
        kept = FitPrune().indices(tokens_of(visual, text, VISUAL - len(expected)))[0]
        assert kept.tolist() == unpacked(arrays()[f"{case}/kept_mask"], sample)

    @pytest.mark.parametrize("case", golden_cases("full_depth", "kept_after_layer"))
    def test_a_published_recipe_leaves_the_published_tokens_layer_after_layer(self, case):
        _, sample, recipe = case.split("/")
        sample, percent = int(sample.removeprefix("sample")), recipe.removeprefix("recipe")
        alive = torch.arange(VISUAL)
        for layer, gone in enumerate(read_recipe(f"llava-1.5-7b/{percent}").deleted):
            tokens = tokens_of(*received(sample, layer, alive), len(alive) - gone)
            alive = alive[FitPrune().indices(tokens)[0]]
            assert alive.tolist() == unpacked(arrays()[f"{case}/kept_after_layer"][layer], sample)

    def test_the_published_recipes_are_known_by_name(self):
        for percent, deleted in GOLDEN["published_recipes_llava15_7b"].items():
            assert list(read_recipe(f"llava-1.5-7b/{percent}").deleted) == deleted


def tokens_of(visual: torch.Tensor, text: torch.Tensor, k: int) -> VisualTokens:
    return VisualTokens(torch.zeros(1, len(visual), 1), k, visual_attention=visual[None], text_attention=text[None])


class TestDeletable:
    ATTENTION = torch.tensor([0.4, 0.1, 0.3, 0.2])

    @pytest.mark.parametrize(
        ("least", "gone"),
        [(1.0, []), (0.95, []), (0.85, [1]), (0.65, [1, 3]), (0.35, [1, 2, 3]), (0.0, [1, 2, 3]), (1.5, [])],
    )
    def test_the_rest_keeps_at_least_so_much(self, least, gone):
        assert expendable(self.ATTENTION, least).nonzero().flatten().tolist() == gone

    def test_one_token_stays_whatever_it_receives(self):
        assert (~expendable(torch.zeros(5), 0.0)).nonzero().flatten().tolist() == [0]
        assert expendable(torch.tensor([1.0]), 0.0).tolist() == [False]

    def test_both_kinds_of_attention_must_spare_it(self):
        gone = deletable(torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.1, 0.7, 0.2]), (1.0, 1.0), alpha=0.35)
        assert gone.tolist() == [True, False, False]


class TestRecipes:
    METADATA = json.loads((Path(__file__).parents[1] / "support" / "recipe_of_four_layers.json").read_text())

    def changed(self, **changes):
        return self.METADATA | changes

    def test_it_says_what_is_there_in_every_layer(self):
        recipe = parse_recipe(self.METADATA, "mine")
        assert recipe.kept == (*ENTERING, BEHIND[-1])
        assert recipe.schedule == ((1, 12 / 16), (2, 7 / 16), (3, 5 / 16), (4, 4 / 16))
        assert recipe.mean_fraction == sum(ENTERING) / 4 / 16

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"format": 2}, "is no recipe.*format 1, not 2"),
            ({"deleted": [4, 5]}, "2 numbers for 4 layers"),
            ({"deleted": [4, 5, -1, 0]}, r"whole number >= 0.*\(4, 5, -1, 0\)"),
            ({"deleted": [4, 5.0, 1, 0]}, "whole number"),
            ({"deleted": "4 5 1 0"}, "must list"),
            ({"deleted": [4, 5, 6, 1]}, "16 of 16 visual tokens leave"),
            ({"tokens": None}, "of None visual tokens"),
            ({"model": {"layers": 4}}, "does not state visual_tokens"),
            ({"model": None}, "does not state layers"),
        ],
    )
    def test_what_is_no_recipe_is_told_why(self, changes, said):
        with pytest.raises(ValueError, match=said):
            parse_recipe(self.changed(**changes), "mine")

    def test_an_unreadable_file_or_unknown_name_is_refused_with_the_names_there_are(self, tmp_path):
        (tmp_path / "bad.json").write_text("{")
        with pytest.raises(ValueError, match=r"bad\.json cannot be read"):
            read_recipe(str(tmp_path / "bad.json"))
        for name in ("nothing.json", "llava-1.5-7b/61", "llava-mini/../suite", "llava-mini/"):
            with pytest.raises(ValueError, match=r"there is no recipe.*llava-1\.5-7b/60"):
                read_recipe(name)

    def test_known_names_can_be_read(self):
        assert {"llava-1.5-7b/0", "llava-1.5-7b/90"} <= set(known_recipes())
        assert all(isinstance(read_recipe(name), Recipe) for name in known_recipes())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The file of a recipe that drops in all four layers, the last one included."""
    file = tmp_path_factory.mktemp("recipe") / "recipe.json"
    metadata = TestRecipes.METADATA | {"model": {"name": "a tiny model", "layers": LAYERS, "visual_tokens": N}}
    file.write_text(json.dumps(metadata))
    return str(file)


def strongest_attention(layer, normed, rotary):
    """(T, T) of the first row, from the whole map as transformers' eager attention makes it; and its output."""
    attention = layer.self_attn
    shape = (*normed.shape[:2], -1, attention.head_dim)
    q, k, v = (p(normed).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    mask = torch.full((normed.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    heads, weights = eager_attention_forward(attention, q, k, v, mask, scaling=attention.scaling)
    return heads.flatten(2), weights[0].amax(dim=0)


class TestObservedAttention:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("family", ["llama", "mistral"])
    @pytest.mark.parametrize("most", [1, 1 << 20], ids=["one-query", "all-queries"])
    def test_it_is_the_layers_own_in_pieces_of_any_size(self, tower, family, side, most):
        """Two rows, one of them padded; two images in the longer one."""
        layer = build(tower, family).model.layers[1]
        draw = torch.Generator().manual_seed(1)
        index = [torch.tensor([-1] * 3 + [0] * 4 + [-1] * 2 + [1] * 5 + [-1] * 3), torch.tensor([-1, 2, 2, 2, -1, -1])]
        length = len(index[0])
        rows = [torch.randn(len(row), 48, generator=draw) for row in index]
        pad = {"batch_first": True, "padding_side": side}
        hidden = torch.nn.utils.rnn.pad_sequence(rows, **pad)
        image = torch.nn.utils.rnn.pad_sequence(index, padding_value=-1, **pad)
        valid = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in index], **pad)
        positions = (valid.long().cumsum(1) - 1).clamp_min(0)
        rotary = self.rotary(tower, family, hidden, positions)
        asking = valid & (image < 0)
        with torch.no_grad():
            normed = layer.input_layernorm(hidden)
            heads, visual, text = observed_attention(
                layer.self_attn, normed, rotary, valid, image, asking, None, most_logits=most
            )
            for row, own in enumerate(index):
                here = slice(length - len(own), length) if side == "left" else slice(0, len(own))
                turned = tuple(part[row : row + 1, here] for part in rotary)
                expected, strongest = strongest_attention(layer, normed[row : row + 1, here], turned)
                torch.testing.assert_close(heads[row, here], expected[0], rtol=1e-4, atol=1e-5)
                for number in own.unique().tolist():
                    if number == -1:
                        continue
                    mine = own == number
                    block = strongest[mine][:, mine].mean(dim=0)
                    torch.testing.assert_close(visual[row, here][mine], block, rtol=1e-4, atol=1e-6)
                    torch.testing.assert_close(
                        text[row, here][mine], strongest[own < 0][:, mine].sum(dim=0), rtol=1e-4, atol=1e-6
                    )

    @staticmethod
    def rotary(tower, family, hidden, positions):
        return build(tower, family).model.rotary_emb(hidden, position_ids=positions)

    def test_keys_and_values_of_all_tokens_go_into_the_cache(self, model):
        hidden = torch.randn(1, 6, 48, generator=torch.Generator().manual_seed(2))
        positions = torch.arange(6)[None]
        rotary = model.model.rotary_emb(hidden, position_ids=positions)
        ours, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
        attention, row = model.model.layers[0].self_attn, torch.ones(1, 6, dtype=torch.bool)
        with torch.no_grad():
            observed_attention(attention, hidden, rotary, row, torch.full((1, 6), -1), row, ours)
            attention(hidden, position_embeddings=rotary, attention_mask=None, **{CACHE: theirs})
        for a, b in zip(ours.layers[0].keys, theirs.layers[0].keys, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(ours.layers[0].values, theirs.layers[0].values, strict=True):
            torch.testing.assert_close(a, b)


def layer_by_layer(model, hidden, first):
    """One row with an image from place ``first`` on, by hand: whole attention maps, rows left out behind them."""
    decoder = model.model
    kept = torch.arange(hidden.shape[1])
    for layer, gone in zip(decoder.layers, DELETED, strict=True):
        rotary = decoder.rotary_emb(hidden, position_ids=kept[None])
        heads, strongest = strongest_attention(layer, layer.input_layernorm(hidden), rotary)
        visual = ((kept >= first) & (kept < first + N)).nonzero().flatten()
        behind = kept >= first + N
        scores = strongest[visual][:, visual].mean(0) * strongest[behind][:, visual].sum(0)
        stays = torch.ones(len(kept), dtype=torch.bool)
        stays[visual[scores.argsort()[:gone]]] = False
        hidden = hidden[:, stays] + layer.self_attn.o_proj(heads[:, stays])
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        kept = kept[stays]
    return model.lm_head(decoder.norm(hidden))


class TestInTheDecoder:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("family", ["llama", "mistral"])
    def test_tokens_leave_behind_a_layers_attention_and_before_its_projection(self, tower, recipe, family, attention):
        model = build(tower, family)
        model.set_attn_implementation(attention)
        ids, images = prompt(5, 7)[None], pixels(1)
        with torch.no_grad():
            embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)[4]
            expected = layer_by_layer(model, embeds, first=6)
            with pruning(model, "fitprune", recipe=recipe):
                found = model(input_ids=ids, images=images).logits
        assert found.shape[1] == 13 + BEHIND[-1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_the_loss_is_that_of_the_kept_row(self, model, recipe):
        """Labels follow their tokens although tokens leave in the last layer, too."""
        ids, images = torch.cat([prompt(4, 6), torch.tensor([7, 8, 9])])[None], pixels(1)
        labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 3, IGNORE_INDEX, ids[0])[None]
        with pruning(model, "fitprune", recipe=recipe), torch.no_grad():
            out = model(input_ids=ids, labels=labels, images=images)
        expected = torch.nn.functional.cross_entropy(out.logits[0, -4:-1], torch.tensor([7, 8, 9]))
        torch.testing.assert_close(out.loss, expected)

    def test_what_is_to_be_predicted_takes_no_part(self, model, recipe):
        row, images, kept = prompt(4, 6)[None], pixels(1), []
        with pruning(model, "fitprune", recipe=recipe), torch.no_grad():
            for answer in ([7, 8, 9], [100, 101, 102]):
                ids = torch.cat([row, torch.tensor([answer])], dim=1)
                labels = torch.cat([torch.full_like(row, IGNORE_INDEX), ids[:, -3:]], dim=1)
                model(input_ids=ids, labels=labels, images=images)
                kept.append(model.latest_prefill.left.source[0].tolist())
            model(input_ids=row, images=images)
        assert kept[0] == kept[1]
        assert kept[0][:-3] == model.latest_prefill.left.source[0].tolist()

    @pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("mistral", "eager")])
    def test_the_flops_of_a_run_are_the_predicted_ones(self, tower, recipe, family, attention):
        """The ranking reads the attention that the layer computes anyway: it costs no product of its own."""
        model = build(tower, family)
        model.set_attn_implementation(attention)
        shape = ModelShape.of(model.config, model.get_vision_tower().config)
        expected = exact_flops(
            shape,
            flops.tokens_per_layer(13, ENTERING),
            after=flops.tokens_per_layer(13, BEHIND),
            logits=13 + BEHIND[-1],
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad(), pruning(model, "fitprune", recipe=recipe):
            model(input_ids=prompt(5, 7)[None], images=pixels(1))
        assert counter.get_total_flops() == pytest.approx(expected.total, rel=1e-3)
        assert model.visual_tokens_per_layer == [ENTERING]
        assert model.visual_tokens_after_attention == [BEHIND]

    def test_nan_is_refused(self, tower, recipe):
        model = build(tower)
        model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
        with pruning(model, "fitprune", recipe=recipe), pytest.raises(ValueError, match=r"_attention.*NaN"):
            model(input_ids=prompt(5, 4)[None], images=pixels(1))

    def test_an_image_without_text_behind_it_is_refused(self, model, recipe):
        with (
            pruning(model, "fitprune", recipe=recipe),
            pytest.raises(ValueError, match=r"text after them.*no text follows"),
        ):
            model(input_ids=prompt(5, 0)[None], images=pixels(1))


class TestTheSwitch:
    def test_a_recipe_is_read_from_the_environment(self, recipe):
        config = PruningConfig.from_env({"BASELINE": "FITPRUNE", "FITPRUNE_RECIPE": recipe})
        assert config.ratio is None and config.layer is None
        assert config.schedule(LAYERS) == read_recipe(recipe).schedule

    @pytest.mark.parametrize(
        ("environ", "said"),
        [
            ({}, "give one of FITPRUNE_RECIPE.*FITPRUNE_REDUCTION_RATIO.*SUBSET_RATIO.*not none of them"),
            ({"FITPRUNE_REDUCTION_RATIO": "0.6", "SUBSET_RATIO": "0.4"}, "not FITPRUNE_REDUCTION_RATIO=0.6 and SUBSET"),
            ({"FITPRUNE_RECIPE": "llava-1.5-7b/60", "SUBSET_RATIO": "0.4"}, "give one of"),
            ({"FITPRUNE_RECIPE": "llava-1.5-7b/60", "FITPRUNE_REDUCTION_RATIO": "0.6"}, "give one of"),
            ({"SUBSET_RATIO": "0.4", "FITPRUNE_SCALE": "1"}, "FITPRUNE_SCALE=1 takes FITPRUNE_RECIPE and SUBSET_RATIO"),
            ({"SUBSET_RATIO": "0.4", "LAYER_INDEX": "2"}, "LAYER_INDEX=2 must be left out"),
            ({"FITPRUNE_REDUCTION_RATIO": "1"}, "0 <= r < 1, not 1.0"),
            ({"FITPRUNE_REDUCTION_RATIO": "60"}, "0 <= r < 1, not 60"),
            ({"FITPRUNE_REDUCTION_RATIO": "0.6", "FITPRUNE_SAMPLES": "0"}, "FITPRUNE_SAMPLES must be at least 1"),
            ({"FITPRUNE_RECIPE": "nothing.json"}, "FITPRUNE_RECIPE=nothing.json: there is no recipe"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, environ, said):
        with pytest.raises(ValueError, match=said):
            PruningConfig.from_env({"BASELINE": "FITPRUNE", **environ})

    def test_a_recipe_for_another_depth_or_image_is_refused(self, model, recipe, tmp_path):
        with pytest.raises(ValueError, match=r"LLaVA-1\.5-7B, whose decoder has 32 layers; this one has 4"):
            model.set_pruning(PruningConfig("fitprune", options={"recipe": "llava-1.5-7b/60"}))
        other = json.loads(Path(recipe).read_text())
        other |= {"tokens": 576, "model": other["model"] | {"visual_tokens": 576}}
        (tmp_path / "other.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match="where an image has 576 visual tokens; here it has 16"):
            model.set_pruning(PruningConfig("fitprune", options={"recipe": str(tmp_path / "other.json")}))
        assert model.pruning is None

    def test_a_recipe_for_images_of_one_size_is_refused_where_sizes_differ(self, tower, recipe):
        settings = {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[56, 112], [112, 56]]}
        anyres = build(tower, image_aspect_ratio="anyres", **settings)
        with pytest.raises(ValueError, match="of this model their number depends on the image"):
            anyres.set_pruning(PruningConfig("fitprune", options={"recipe": recipe}))

    def test_a_file_counts_by_its_content(self, recipe, tmp_path):
        file = tmp_path / "recipe.json"
        metadata = json.loads(Path(recipe).read_text())
        prints = []
        for deleted in ([4, 5, 2, 1], [5, 5, 2, 1], [4, 5, 2, 1]):
            file.write_text(json.dumps(metadata | {"deleted": deleted}))
            prints.append(PruningConfig("fitprune", options={"recipe": str(file)}).fingerprint())
        assert prints[0] == prints[2] != prints[1]

    @pytest.mark.parametrize("ratio", [0.4, 0.7, 1.0])
    def test_a_recipe_can_be_scaled_to_a_mean(self, recipe, ratio):
        config = PruningConfig("fitprune", ratio, options={"recipe": recipe, "scale": True})
        schedule = config.schedule(LAYERS)
        present = [min((f for layer, f in schedule if layer <= depth), default=1.0) for depth in range(LAYERS)]
        assert sum(present) / LAYERS == pytest.approx(ratio, abs=1e-9)

    def test_a_mean_that_the_first_layer_alone_exceeds_is_refused(self):
        config = PruningConfig("fitprune", 0.1)
        assert config.schedule(32) == ()
        with pytest.raises(ValueError, match=r"SUBSET_RATIO=0\.1 is out of reach in a decoder of 8 layers"):
            config.schedule(8)

    def test_flops_are_counted_with_a_recipe_and_only_with_one(self, capsys):
        flops_command(["--method", "fitprune", "--option", "recipe=llava-1.5-7b/60", "--text", "0"])
        shown = capsys.readouterr().out
        assert "0: 576, 1: 562, 2: 529" in shown
        recipe, shape = read_recipe("llava-1.5-7b/60"), SHAPES["1.5-7b"]
        expected = exact_flops(shape, recipe.kept[:-1], after=recipe.kept[1:]).decoder
        assert f"{expected / 1e12:.4f}" in shown
        assert flops_command(["--method", "fitprune:reduction_ratio=0.6"]) == 2
        assert "fitted to a model: give a recipe" in capsys.readouterr().err


def test_a_merging_method_cannot_drop_behind_the_attention(model):
    from llava.model.active_pruner import ActivePruner

    class Merging(FitPrune):
        merges = True

    with pytest.raises(ValueError, match="Merging merges tokens"):
        ActivePruner(Merging(), ((1, 0.5),))


def test_published_reductions_are_those_of_the_budget():
    """Within half a per cent of what it is called; those that save little are off by more, every layer rounded down."""
    cost = visual_flops(SHAPES["1.5-7b"].decoder)
    for percent in (50, 60, 70, 80, 90):
        walk = Walk.of(read_recipe(f"llava-1.5-7b/{percent}").kept)
        assert 1 - walk.stopped_at(cost)[-1] / walk.unpruned(cost) == pytest.approx(percent / 100, abs=0.005)
