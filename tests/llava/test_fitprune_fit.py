"""Fitting FitPrune's recipes: data, statistics, search, and what is written; on a tiny model."""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.fitting import data
from llava.fitting.data import find_questions
from llava.fitting.fitprune import __main__ as command_line
from llava.fitting.fitprune import statistics
from llava.fitting.fitprune.fit import Budget, fit, write_recipe
from llava.fitting.fitprune.search import TOKENS, Found, Walk, kept_by, least_share, search, settle, visual_flops
from llava.fitting.fitprune.statistics import Statistics
from llava.fitting.prompts import Prompts
from llava.flops import SHAPES, load_shape
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, pruning
from llava.pruning.methods.fitprune.recipe import SHIPPED_FOLDER, describe, model_fingerprint, read_recipe
from tiny_llava import build, pixels, prompt
from tiny_prompts import Words, noise, questions

N, LAYERS = 16, 4
COST = visual_flops(SHAPES["1.5-7b"].decoder)


@pytest.fixture(scope="module")
def model(tower):
    return build(tower)


@pytest.fixture(scope="module")
def gathered(model, tmp_path_factory):
    """Shared: a pass that one test has made is there for the next."""
    return gather(model, tmp_path_factory.mktemp("gathered"))


def gather(model, folder, count: int = 5, opener=None) -> Statistics:
    asked = Prompts(questions(count, opener), Words(), model.config)
    return Statistics(model, model.get_vision_tower().image_processor, asked, folder)


def other_weights(tower):
    other = build(tower)
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    return other


@pytest.fixture
def sent(monkeypatch):
    """The names of the samples that went through the model."""
    names, original = [], statistics.send

    def counted(model, image_processor, prompt, look):
        names.append(prompt.name)
        original(model, image_processor, prompt, look)

    monkeypatch.setattr(statistics, "send", counted)
    return names


def falling_walk(alpha: float) -> Walk:
    """Two samples of 100 and 50 tokens, each layer of three losing the share alpha."""
    kept = [[round(n * (1 - alpha) ** layer) for layer in range(4)] for n in (100, 50)]
    return Walk(
        2, [sum(column) for column in zip(*kept, strict=True)], [a * a + b * b for a, b in zip(*kept, strict=True)]
    )


class TestSearch:
    def test_costs_of_stopping_at_each_layer_add_up(self):
        walk = Walk.of([10, 7, 4])
        first = COST.attention(10, 100)
        assert walk.stopped_at(COST) == [
            2 * COST.layer(10, 100),
            first + COST.rest * 7 * 0 + COST.rest * 7 + COST.layer(7, 49),
            first + COST.rest * 7 + COST.attention(7, 49) + COST.rest * 4,
        ]
        assert walk.unpruned(COST) == walk.stopped_at(COST)[0]

    @pytest.mark.parametrize("share", [0.35, 0.8, 1.0])
    def test_alpha_is_the_smallest_on_the_grid_that_meets_the_budget(self, share):
        found = search(falling_walk, TOKENS, share)
        assert found.walk.stopped_at(TOKENS)[found.stop] <= share * found.walk.unpruned(TOKENS)
        below = falling_walk(found.alpha - 2**-7)
        assert found.alpha == 2**-7 or below.stop(TOKENS, share) is None

    def test_the_walk_of_all_alphas_is_asked_for_where_none_below_is_enough(self):
        def stubborn(alpha: float) -> Walk:
            return Walk.of([10, 1, 1] if alpha == 1 else [10, 10, 10])

        assert search(stubborn, TOKENS, 0.6).alpha == 1
        with pytest.raises(ValueError, match=r"no recipe meets the budget, 0\.5 of.*0\.55 of it are left"):
            search(stubborn, TOKENS, 0.5)

    @pytest.mark.parametrize("cost", [COST, TOKENS], ids=["flops", "tokens"])
    @pytest.mark.parametrize("share", [0.3, 0.5, 0.81, 1.0])
    @pytest.mark.parametrize("seed", range(4))
    def test_whole_tokens_meet_the_budget_and_spend_it(self, cost, share, seed):
        draw = np.random.default_rng(seed)

        def walk_at(alpha: float) -> Walk:
            # Samples that lose different numbers, so that means are no whole numbers.
            kept = [[64]] * 7
            for _ in range(8):
                kept = [[*own, max(1, own[-1] - draw.binomial(own[-1] // 2, alpha))] for own in kept]
            return Walk(7, np.sum(kept, 0).tolist(), np.square(kept).sum(0).tolist())

        found = search(walk_at, cost, share)
        deleted = settle(found, cost, share)
        spent = [Walk.of(kept_by(d, 64)).stopped_at(cost)[-1] for d in (deleted, *less_by_one(deleted))]
        allowed = share * Walk.of([64] * 9).unpruned(cost)
        assert spent[0] <= allowed * (1 + 1e-9)
        # One token given back to the last layer that drops would be one too many.
        assert len(spent) == 1 or spent[1] > allowed
        assert all(n == 0 for n in deleted[found.stop :])

    def test_the_largest_remainder_is_rounded_up_where_rounding_down_misses_the_budget(self):
        """Ten samples lose 3.2, 3.9 and 2.4 of 20 tokens: 20 + 17 + 14 tokens enter, of which 50 are allowed."""
        found = Found(0.5, Walk(10, [200, 168, 129, 105], [4000, 2830, 1670, 1110]), 3)
        assert found.scheme == [3, 3, 2]
        # What leaves in the last layer enters none.
        assert settle(found, TOKENS, 50 / 60) == (3, 4, 0)


def less_by_one(deleted):
    """The recipe with one token fewer in the last layer that drops, or nothing."""
    for layer in reversed(range(len(deleted))):
        if deleted[layer]:
            return [(*deleted[:layer], deleted[layer] - 1, *deleted[layer + 1 :])]
    return []


class TestBudget:
    @pytest.mark.parametrize(
        ("budget", "said"),
        [
            ({"reduction_ratio": 1.0}, "0 <= r < 1, not 1.0"),
            ({"reduction_ratio": -0.1}, "0 <= r < 1, not -0.1"),
            ({"reduction_ratio": float("nan")}, "not nan"),
            ({"subset_ratio": 0.0}, "0 < r <= 1, not 0.0"),
            ({"subset_ratio": 1.5}, "0 < r <= 1, not 1.5"),
            ({}, "a reduction ratio or a subset ratio"),
            ({"subset_ratio": 0.5, "reduction_ratio": 0.5}, "a reduction ratio or a subset ratio"),
        ],
    )
    def test_one_out_of_range_is_refused(self, budget, said):
        with pytest.raises(ValueError, match=said):
            Budget(**budget)

    def test_one_that_no_recipe_meets_is_refused_with_what_can_be_met_before_anything_runs(self, gathered, sent):
        assert least_share(TOKENS, 10, 5) == (10 + 4) / 50
        with pytest.raises(ValueError, match="no recipe meets"):
            fit(gathered, Budget(0.99), "tiny")
        assert sent == []
        with pytest.raises(
            ValueError, match=r"no recipe meets a reduction ratio of 0\.995 .*32 layers: the most is 0\.99,"
        ):
            Budget(0.995).check(SHAPES["1.5-7b"], 576)
        with pytest.raises(
            ValueError, match=r"no recipe meets a subset ratio of 0\.03 .*32 layers: the least is 0\.03"
        ):
            Budget(subset_ratio=0.03).check(SHAPES["1.5-7b"], 576)
        Budget(0.98).check(SHAPES["1.5-7b"], 576)


class TestStatistics:
    def test_they_are_sums_over_the_layers_own_attention(self, tower, model, gathered):
        eager = build(tower)
        eager.set_attn_implementation("eager")
        found = gathered.unpruned()
        assert found.shape == (5, LAYERS, 2)
        for number in range(5):
            sample = gathered.prompts[number]
            images = gathered.image_processor([sample.image], return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                embeds = eager.prepare_inputs_labels_for_multimodal(
                    sample.input_ids[None], None, None, None, None, images
                )[4]
                maps = eager.model(inputs_embeds=embeds, output_attentions=True).attentions
            first = int((sample.input_ids < 0).nonzero())
            visual, behind = slice(first, first + N), slice(first + N, None)
            for layer, attention in enumerate(maps):
                strongest = attention[0].amax(dim=0)
                text = strongest[behind, visual]
                assert len(text) == sample.text_after
                expected = float(strongest[visual, visual].sum()) / N, float(text.sum()) / len(text)
                np.testing.assert_allclose(found[number, layer], expected, rtol=1e-4)
        assert gathered.text_tokens() == np.mean([gathered.prompts[number].text for number in range(5)])

    def test_another_budget_sends_nothing_but_walks_that_were_not_made(self, model, tmp_path, sent):
        own = gather(model, tmp_path)
        fit(own, Budget(0.5), "tiny")
        walks = len(list(own.folder.glob("walk-*.npy")))
        assert len(sent) == 5 * (1 + walks + 1)
        fit(gather(model, tmp_path), Budget(0.4), "tiny")
        more = len(list(own.folder.glob("walk-*.npy"))) - walks
        assert len(sent) == 5 * (1 + walks + 1) + 5 * (more + 1) and more < walks
        assert json.loads((own.folder / "about.json").read_text()) == own.metadata

    def test_what_was_stopped_continues_and_ends_in_the_same_numbers(
        self, model, gathered, tmp_path, monkeypatch, sent
    ):
        """Nor is there ever more than one image."""
        monkeypatch.setattr(statistics, "SECONDS_BETWEEN_SAVES", 0)
        deleted = (3, 2, 0, 1)
        expected = [gathered.unpruned().tolist(), gathered.walk(0.25), gathered.divergence(deleted, N)]
        sent.clear()
        found, alive = [], []
        for _ in range(6):
            # Every attempt ends at another sample of another pass.
            left = iter(range(3))

            def opener(number, left=left):
                assert sum(ref() is not None for ref in alive) <= 1
                if next(left, None) is None:
                    raise KeyboardInterrupt
                image, question = questions(5).opener(number)
                alive.append(weakref.ref(image))
                return image, question

            part = gather(model, tmp_path, opener=opener)
            try:
                found = [part.unpruned().tolist(), part.walk(0.25), part.divergence(deleted, N)]
            except KeyboardInterrupt:
                continue
        assert found == expected
        assert len(sent) == 15

    def test_other_weights_samples_or_words_have_numbers_of_their_own(self, tower, model, gathered):
        root = gathered.folder.parent
        words = Prompts(questions(5), Words(), model.config, conversation="llava_v0")
        folders = {
            gathered.folder,
            gather(other_weights(tower), root).folder,
            gather(model, root, count=4).folder,
            gather(build(tower).half(), root).folder,
            gather(build(tower).half().float(), root).folder,
            Statistics(model, None, words, root).folder,
        }
        assert len(folders) == 6
        assert gather(build(tower), root).folder == gathered.folder

    def test_nan_is_told_by_sample_and_layer(self, tower, tmp_path):
        spoilt = build(tower)
        spoilt.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"^image sample 0: .* decoder layer 1 contains NaN .*--dtype"):
            gather(spoilt, tmp_path).unpruned()

    def test_an_image_without_text_or_a_damaged_one_is_told(self, model, tmp_path):
        def opener(number: int):
            return noise(number), " \n" if number == 1 else "what"

        with pytest.raises(ValueError, match=r"^image sample 1: nothing is asked"):
            gather(model, tmp_path, opener=opener).unpruned()
        (tmp_path / "bad.png").write_bytes(b"nothing")
        entry = {"id": "x", "image": "bad.png", "conversations": turns("<image>\nwhat")}
        (tmp_path / "data.json").write_text(json.dumps([entry]))
        source = find_questions(str(tmp_path / "data.json"), 1)
        with pytest.raises(OSError, match=r"conversation x: .*bad\.png is not an image"):
            Prompts(source, Words(), model.config)[0]


class TestRecipe:
    @pytest.fixture
    def recipe(self, gathered, tmp_path):
        return write_recipe(fit(gathered, Budget(0.5), "tiny"), tmp_path / "recipe.json")

    def test_it_says_where_it_comes_from_and_what_it_costs(self, model, gathered, recipe):
        metadata = recipe.metadata
        assert metadata["model"] == {
            "name": "tiny",
            "weights": model_fingerprint(model),
            "layers": LAYERS,
            "visual_tokens": N,
        }
        assert metadata["data"] == gathered.prompts.metadata()
        assert metadata["budget"] == {"reduction_ratio": 0.5}
        assert {"llava", "torch", "transformers", "python", "dtype"} <= set(metadata["versions"])
        assert metadata["kept"] == list(recipe.kept)
        assert metadata["mean_fraction"] == recipe.mean_fraction
        assert metadata["flops"]["visual"]["reduction_ratio"] >= 0.5
        assert 0 < metadata["alpha"] < 1

    def test_a_run_performs_the_predicted_flops(self, model, gathered, recipe):
        """Of a prompt with as many text tokens as the samples have in the mean; one position has logits."""
        predicted = recipe.metadata["flops"]["prefill"]
        ids = prompt(5, predicted["text_tokens"] - 6)[None]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, images=pixels(1), logits_to_keep=1)
        assert counter.get_total_flops() == pytest.approx(predicted["unpruned"], rel=1e-3)
        with torch.no_grad(), pruning(model, "fitprune", recipe=recipe.name), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, images=pixels(1), logits_to_keep=1)
        assert counter.get_total_flops() == pytest.approx(predicted["pruned"], rel=1e-3)
        assert predicted["pruned"] < 0.9 * predicted["unpruned"]

    def test_divergence_is_what_the_recipe_takes_away_as_it_runs(self, model, gathered, recipe):
        """The pruned model's own survivors, and the attention that they receive, by hand."""
        kept: list[list[float]] = []
        for number in range(5):
            row: list[float] = []

            def look(layer, visual, text, row=row):
                order = (visual * text).argsort(descending=True, stable=True)[: recipe.kept[layer + 1]]
                row.append(float(text[order].sum()))
                stays = torch.zeros(len(visual), dtype=torch.bool)
                stays[order] = True
                return stays

            statistics.send(model, gathered.image_processor, gathered.prompts[number], look)
            kept.append(row)
        lost = (1 - np.array(kept) / gathered.unpruned()[:, :, 1]).clip(min=0).mean(axis=0)
        np.testing.assert_allclose(recipe.metadata["divergence"]["text"], lost, atol=2e-6)
        with torch.no_grad(), pruning(model, "fitprune", recipe=recipe.name):
            model(input_ids=prompt(5, 7)[None], images=pixels(1))
            assert model.visual_tokens_per_layer == [recipe.kept[:-1]]

    @pytest.mark.parametrize("ratio", [0.35, 0.6, 0.9])
    def test_a_subset_ratio_is_the_mean_over_the_layers(self, gathered, ratio):
        metadata = fit(gathered, Budget(subset_ratio=ratio), "tiny")
        # within the tokens that one layer holds
        assert ratio - 1 / N < metadata["mean_fraction"] <= ratio

    def test_images_of_different_sizes_have_a_recipe_of_shares(self, tower, tmp_path):
        anyres = build(
            tower,
            image_aspect_ratio="anyres",
            mm_patch_merge_type="spatial_unpad",
            image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        )

        def opener(number: int):
            return noise(number).resize(((100, 50), (60, 100))[number % 2]), "what is this"

        metadata = fit(gather(anyres, tmp_path, opener=opener), Budget(0.5), "tiny")
        assert metadata["model"]["visual_tokens"] is None and metadata["tokens"] > N
        write_recipe(metadata, tmp_path / "recipe.json")
        with torch.no_grad(), pruning(anyres, "fitprune", recipe=str(tmp_path / "recipe.json")):
            anyres(input_ids=prompt(5, 7)[None], images=[pixels(5)], image_sizes=[(112, 112)])
        total, kept = anyres.visual_token_counts[0]
        assert kept == pytest.approx(total * metadata["kept"][-2] / metadata["tokens"], abs=0.51)

    def test_use_tells_both_budgets_and_other_weights_in_the_dtype_they_were_fitted_in(self, tower, model, recipe):
        pruner = PruningConfig("fitprune", options={"recipe": recipe.name}).build_pruner()
        (told,) = pruner.advice(model)
        assert told == f"{recipe.name}: {describe(recipe)}"
        assert "reduction ratio 0.5" in told and f"SUBSET_RATIO {recipe.mean_fraction:.4g}" in told
        other = other_weights(tower)
        assert "was fitted to other weights" in pruner.advice(other)[1]
        # Rounded weights have other values anyway: nothing can be known.
        assert not recipe.of_other_weights(other.half())
        (published,) = PruningConfig("fitprune", options={"recipe": "llava-1.5-7b/60"}).build_pruner().advice(model)
        assert published.startswith("llava-1.5-7b/60: SUBSET_RATIO 0.4")


class TestFirstUse:
    """FITPRUNE_REDUCTION_RATIO or SUBSET_RATIO, without a recipe."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tmp_path / "otprune" / "fitprune"

    def test_a_recipe_is_fitted_once_and_told(self, model, cache, sent, capsys, monkeypatch):
        monkeypatch.setattr(model, "prompt_tokenizer", Words())
        ids, images = prompt(5, 7)[None], pixels(1)
        with pruning(model, "fitprune", reduction_ratio=0.5, samples=3), torch.no_grad():
            first = model(input_ids=ids, images=images).logits
            assert model.pruning.options["reduction_ratio"] == 0.5
        assert len(sent) >= 3 * 3
        told = capsys.readouterr().err
        assert "fitting a recipe on 3 images" in told and "reduction ratio 0.5" in told and "SUBSET_RATIO 0." in told
        file = next(cache.glob("*/50.json"))
        recipe = read_recipe(str(file))
        assert recipe.metadata["data"]["name"] == "mini" and recipe.metadata["data"]["samples"] == 3
        sent.clear()
        with pruning(model, "fitprune", reduction_ratio=0.5, samples=3), torch.no_grad():
            assert torch.equal(model(input_ids=ids, images=images).logits, first)
        with pruning(model, "fitprune", recipe=str(file)), torch.no_grad():
            assert torch.equal(model(input_ids=ids, images=images).logits, first)
        assert sent == []

    def test_a_subset_ratio_is_translated_and_told(self, model, capsys, monkeypatch):
        monkeypatch.setattr(model, "prompt_tokenizer", Words())
        with pruning(model, "fitprune", ratio=0.6, samples=2), torch.no_grad():
            model(input_ids=prompt(5, 7)[None], images=pixels(1))
            present = model.visual_tokens_per_layer[0]
        assert 0.6 - 1 / N < sum(present) / LAYERS / N <= 0.6
        assert "SUBSET_RATIO 0." in capsys.readouterr().err

    def test_one_that_ships_with_this_very_model_is_taken(self, model, sent, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(model, "prompt_tokenizer", Words())
        asked = Prompts(find_questions("mini", 2), Words(), model.config)
        own = Statistics(model, model.get_vision_tower().image_processor, asked, tmp_path)
        write_recipe(fit(own, Budget(0.5), "tiny"), tmp_path / "shipped" / "50.json")
        monkeypatch.setattr("llava.fitting.fitprune.fit.SHIPPED_FOLDER", tmp_path / "shipped")
        sent.clear()
        with pruning(model, "fitprune", reduction_ratio=0.5, samples=2), torch.no_grad():
            model(input_ids=prompt(5, 7)[None], images=pixels(1))
        assert sent == [] and "llava-mini/50" in capsys.readouterr().err
        with pruning(model, "fitprune", reduction_ratio=0.5, samples=1), torch.no_grad():
            model(input_ids=prompt(5, 7)[None], images=pixels(1))
        assert sent

    def test_without_a_tokenizer_nothing_can_be_asked(self, model):
        with pruning(model, "fitprune", reduction_ratio=0.5), pytest.raises(ValueError, match="prompt_tokenizer"):
            model(input_ids=prompt(5, 7)[None], images=pixels(1))
        assert model.pruning is None

    def test_one_that_cannot_be_met_leaves_the_switch_as_it_was(self, model, monkeypatch):
        monkeypatch.setattr(model, "prompt_tokenizer", Words())
        model.set_pruning(PruningConfig("fitprune", options={"reduction_ratio": 0.99}))
        for _ in range(2):
            with pytest.raises(ValueError, match=r"no recipe meets a reduction ratio of 0\.99"):
                model(input_ids=prompt(5, 7)[None], images=pixels(1))
        assert model.pruning.options["reduction_ratio"] == 0.99


def turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "a cat"}]


class TestData:
    def test_a_file_gives_its_first_questions_about_one_noise(self, tmp_path):
        entries = [
            {"id": f"c{number}", "image": f"{number}.png", "conversations": turns("<image>\nwhat?") * 2}
            for number in range(3)
        ]
        for number, entry in enumerate(entries):
            entry["conversations"] = turns(f"<image>\nwhat {number}?") + turns("and then?")
            noise(number).save(tmp_path / f"{number}.png")
        entries.append({"id": "text", "conversations": turns("hello")})
        entries.append({"id": "two", "image": ["0.png", "1.png"], "conversations": turns("<image><image> which?")})
        file = tmp_path / "data.json"
        file.write_text(json.dumps(entries))
        source = find_questions(str(file), 10, image_folder=tmp_path)
        found = sorted((source.names[number], source.open(number)[1]) for number in range(len(source)))
        assert found == [(f"of {file}, conversation c{number}", f"what {number}?") for number in range(3)]
        few = find_questions(str(file), 2, seed=1)
        assert len(few) == 2 and few.digest == source.digest
        file.write_text(json.dumps(entries[3:]))
        with pytest.raises(ValueError, match="holds no conversation about exactly one image"):
            find_questions(str(file), 1)

    def test_the_embedded_world_gives_as_many_as_are_asked_for_and_the_same_each_time(self):
        first, again = (find_questions("mini", 40, seed=2).open(33) for _ in range(2))
        assert first[1] == again[1].strip() and first[0].tobytes() == again[0].tobytes()
        assert first[0].size == (336, 336)
        assert len({find_questions("mini", *chosen).digest for chosen in ((40, 2), (40, 3), (39, 2))}) == 3
        # This one has a single object, and the first twenty questions that come to mind do not fit it.
        assert find_questions("mini", 131, seed=7).open(130)[1].strip()
        with pytest.raises(ValueError, match="at least one sample is needed to learn from, not 0"):
            find_questions("mini", 0)

    def test_a_prompt_is_the_benchmarks_conversation_without_an_answer(self, model):
        sample = Prompts(questions(2), Words(), model.config)[1]
        text = "USER: <image>\nwhat is this what is this ASSISTANT:"
        assert sample.text_after == len(text.split("<image>")[1].split())
        assert int((sample.input_ids < 0).sum()) == 1 and sample.text == len(sample.input_ids) - 1
        with pytest.raises(ValueError, match=r"unknown conversation mode 'vicuna'; allowed: .*vicuna_v1"):
            Prompts(questions(2), Words(), model.config, "vicuna")

    def test_a_groups_tasks_share_the_samples(self, monkeypatch):
        """Documents without or with several pictures are passed over; a task that has no more gives way."""

        class Task:
            def __init__(self, name, pictures):
                self.name, self.pictures = name, pictures
                self.eval_docs = self.eval_docs_no_media = list(range(len(pictures)))

            def doc_to_visual(self, document):
                return [noise(document)] * self.pictures[document]

            def doc_to_text(self, document):
                return f"<image> {self.name} {document}?"

        both = {"many": Task("many", [1, 0, 1, 1, 2, 1]), "few": Task("few", [1, 0, 0])}
        monkeypatch.setattr(data, "load_tasks", lambda name: both)
        source = find_questions("group", 5, seed=3)
        names = [name.removeprefix("of ") for name in source.names]
        assert [name.split(",")[0] for name in names] == ["many", "few", "many", "many", "many"]
        assert names[1] == "few, document 0" and source.open(1)[1] == "few 0?"
        assert len(set(names)) == 5 and not {"many, document 1", "many, document 4"} & set(names)
        digests = [find_questions("group", count, seed=3).digest for count in (3, 3, 5)]
        assert digests[0] == digests[1] != digests[2] == source.digest
        monkeypatch.setattr(data, "load_tasks", lambda name: {"none": Task("none", [0, 2])})
        with pytest.raises(ValueError, match="no question about exactly one image"):
            find_questions("group", 5)

    def test_without_lmms_eval_a_task_is_refused(self, monkeypatch):
        def missing(name):
            raise ImportError("No module named 'lmms_eval'")

        monkeypatch.setattr(data, "load_tasks", missing)
        with pytest.raises(ValueError, match=r"gqa is no file or folder, and .* requires the package lmms-eval"):
            find_questions("gqa", 5)


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def shipped_model(self, model, monkeypatch):
        def load(path, base, name, **settings):
            return Words(), model, model.get_vision_tower().image_processor, 2048

        monkeypatch.setattr("llava.model.builder.load_pretrained_model", load)

    def test_recipes_are_written(self, tmp_path, capsys):
        settings = ["--samples", "2", "--statistics", str(tmp_path / "sums"), "--output", str(tmp_path / "recipes")]
        ratios = ["--reduction-ratio", "0.3", "0.6", "--subset-ratio", "0.5"]
        assert command_line.main(["fit", "--model", "tiny", *ratios, *settings]) == 0
        shown = capsys.readouterr().out
        files = [str(tmp_path / "recipes" / f"{name}.json") for name in ("30", "60", "kept50")]
        for file in files:
            assert f"{file}: {describe(read_recipe(file))}" in shown
        assert read_recipe(files[1]).metadata["model"]["name"] == "tiny"

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["fit", "--samples", "0", "--reduction-ratio", "0.5"], "at least one sample"),
            (["fit", "--reduction-ratio", "0.999", "--samples", "1"], "no recipe meets a reduction ratio of 0.999"),
            (["fit", "--reduction-ratio", "1.5"], "0 <= r < 1, not 1.5"),
            (["fit"], "--reduction-ratio or --subset-ratio"),
            (["fit", "--reduction-ratio", "0.5", "--data", "nothing.json"], "nothing.json"),
            (["fit", "--reduction-ratio", "0.1", "0.2", "--output", "one.json"], "2 recipes need a folder"),
            (["fit", "--reduction-ratio", "0.1", "--conv-mode", "no", "--samples", "1"], "unknown conversation mode"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_sentence(self, arguments, said, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert command_line.main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and error.startswith("python -m llava.fitting.fitprune: ") and "\n" not in error

    def test_a_switch_that_is_on_is_refused(self, monkeypatch, capsys):
        monkeypatch.setenv("BASELINE", "UNIFORM")
        monkeypatch.setenv("SUBSET_RATIO", "0.5")
        assert command_line.main(["fit", "--reduction-ratio", "0.5"]) == 2
        assert "unset BASELINE" in capsys.readouterr().err


REMAKE = "llava fitprune fit --samples 64 --reduction-ratio 0.2 0.4 0.6 0.8 0.9 --output LLaVA/llava/mini/recipes"


@pytest.fixture(scope="module")
def embedded():
    return load_pretrained_model("llava-mini", None, "llava-mini", device="cpu", dtype="float32")


@pytest.mark.parametrize("file", sorted(SHIPPED_FOLDER.glob("*.json")), ids=lambda file: file.stem)
class TestShipped:
    def test_is_of_the_shipped_model_and_data_as_they_are(self, file, embedded):
        recipe = read_recipe(f"llava-mini/{file.stem}")
        model, data = recipe.metadata["model"], recipe.metadata["data"]
        source = find_questions("mini", data["samples"], data["seed"])
        found = (recipe.layers, model["name"], model["weights"], data["name"], data["digest"])
        layers = embedded[1].config.num_hidden_layers
        now = (layers, "llava-mini", model_fingerprint(embedded[1]), "mini", source.digest)
        assert found == now, f"made for another checkpoint, or other data; make the recipes again: {REMAKE}"

    def test_meets_its_budget(self, file):
        recipe = read_recipe(f"llava-mini/{file.stem}")
        asked = Budget(**recipe.metadata["budget"]).share
        assert f"{100 * (1 - asked):g}" == file.stem
        walk, cost = Walk.of(recipe.kept), visual_flops(load_shape("llava-mini").decoder)
        assert walk.stopped_at(cost)[-1] <= asked * walk.unpruned(cost) * (1 + 1e-9)
        assert recipe.metadata["flops"]["visual"]["reduction_ratio"] >= 1 - asked - 1e-9
