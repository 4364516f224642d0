"""Numbers of tokens that depend on the image: its effective rank, and patches that occur twice."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from llava.eval.encoder import TransformersEncoder
from llava.eval.rank import main as rank_main
from llava.eval.rank import ranks_of, reference_rank
from llava.pruning import Pruner, PruningConfig, available_methods, kept_count, pruning, registry, select
from llava.pruning.base import INSIDE
from llava.pruning.own_budget import NO_PATCH, count_of, distinct, effective_rank, patch_ids, patch_rows
from llava.pruning.reduce import reduce_images
from llava.pruning.tokens import ImageTokens
from noise_images import noise
from tiny_llava import build, pad_rows, pixels, prompt, save_tower
from tiny_processors import tiny_processor
from tiny_vlms import can_be_pruned, tiny

BEFORE = [name for name, info in available_methods().items() if info.needs <= {"image_keys"} and name != "vtw"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(save_tower(tmp_path_factory.mktemp("tower")))


@pytest.fixture(scope="module")
def anyres(tmp_path_factory):
    settings = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
    return build(save_tower(tmp_path_factory.mktemp("tower")), image_grid_pinpoints=[[112, 112]], **settings)


def tokens(seed: int, n: int = 20, rank: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, rank, generator=generator) @ torch.randn(rank, 16, generator=generator)


def adaptive(reference: float, ratio: float = 0.4, method: str = "otprune") -> PruningConfig:
    return PruningConfig(method, ratio, options={"budget": "effective_rank", "reference_rank": reference})


@dataclass(frozen=True, kw_only=True)
class AtTheFirstLayer(Pruner):
    """Inside the decoder, but at the input of its first layer."""

    where: ClassVar[str] = INSIDE


class TestEffectiveRank:
    def test_is_the_exponential_of_the_entropy_of_the_singular_values(self):
        for seed in range(20):
            x = tokens(seed, n=random.Random(seed).randint(2, 40))
            values = np.linalg.svd(x.double().numpy(), compute_uv=False)
            shares = values[values > 1e-12] / values.sum()
            assert effective_rank(x) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)

    def test_is_one_of_multiples_and_n_of_orthogonal_tokens(self):
        assert effective_rank(torch.ones(7, 5) * torch.arange(7)[:, None]) == pytest.approx(1, abs=1e-3)
        assert effective_rank(torch.eye(6)) == pytest.approx(6)
        assert effective_rank(torch.zeros(4, 3)) == 1


class TestBudget:
    def test_meets_the_ratio_in_the_mean_over_the_images_that_it_was_measured_on(self):
        images = [tokens(seed, n=400, rank=1 + seed % 12) for seed in range(24)]
        reference = reference_rank([(len(one), effective_rank(one)) for one in images])
        pruner = adaptive(reference, 0.2).build_pruner()
        counts = [count_of(pruner, one, 0.2) for one in images]
        assert sum(counts) / (24 * 400) == pytest.approx(0.2, abs=0.5 / 400)
        assert len(set(counts)) > 10

    def test_gives_each_image_its_own_number_whatever_stands_beside_it(self):
        images = [tokens(seed, rank=1 + seed) for seed in range(8)]
        pruner = adaptive(4.0).build_pruner()
        batch = reduce_images(pruner, [ImageTokens(one) for one in images], 0.4)
        for one, kept in zip(images, batch, strict=True):
            k = kept_count(20, min(1.0, 0.4 * effective_rank(one) / 4.0))
            assert kept.indices.tolist() == select(one, k=k).tolist()
            assert select(one, ratio=0.4, budget="effective_rank", reference_rank=4.0).tolist() == kept.indices.tolist()

    def test_prunes_a_batch_as_its_rows_alone(self, model):
        rows = [prompt(4, 3, seed=1), prompt(2, 5, seed=2), prompt(6, 2, seed=3)]
        images = pixels(3) * torch.tensor([0.02, 0.3, 3.0])[:, None, None, None]
        ids, mask = pad_rows(rows, "left")
        with torch.no_grad():
            reference = float(np.mean([effective_rank(one) for one in model.visual_tokens(images)]))
            with pruning(model, adaptive(reference, 0.5)):
                batch = model.generate(ids, attention_mask=mask, images=images, max_new_tokens=4, do_sample=False)
                counts = model.visual_token_counts
                assert len({kept for _, kept in counts}) > 1
                for number, row in enumerate(rows):
                    own = images[number : number + 1]
                    alone = model.generate(row[None], images=own, max_new_tokens=4, do_sample=False)[0]
                    assert model.visual_token_counts == counts[number : number + 1]
                    assert batch[number].tolist() == alone.tolist()

    def test_stands_in_the_configuration_and_its_fingerprint(self):
        one, other, fixed = adaptive(4.0), adaptive(5.0), PruningConfig("otprune", 0.4)
        assert one.to_dict()["options"]["budget"] == "effective_rank"
        assert one.to_dict()["options"]["reference_rank"] == 4.0
        assert len({config.fingerprint() for config in (one, other, fixed)}) == 3
        switch = {"BASELINE": "OURS", "SUBSET_RATIO": "0.4", "OTPRUNE_BUDGET": "effective_rank"}
        assert PruningConfig.from_env(switch | {"OTPRUNE_REFERENCE_RANK": "4"}) == one
        assert PruningConfig.from_text("otprune:budget=effective_rank:reference_rank=4", 0.4, {}) == one

    @pytest.mark.parametrize(
        ("method", "ratio", "layer", "options", "said"),
        [
            ("otprune", 0.1, None, {"budget": "effective_rank"}, "needs reference_rank.*llava rank measures it"),
            ("otprune", 0.1, None, {"reference_rank": 9.0}, "reference_rank=9 goes with budget=effective_rank"),
            ("otprune", 0.1, None, {"budget": "effective_rank", "reference_rank": 0.5}, "a number >= 1, not 0.5"),
            ("otprune", 0.1, None, {"budget": "rank"}, "must be fixed or effective_rank, not 'rank'"),
            ("otprune", 0.1, 2, {"budget": "effective_rank", "reference_rank": 9.0}, "before the decoder"),
            ("fastv", 0.1, None, {"budget": "effective_rank", "reference_rank": 9.0}, "before the decoder"),
            ("pyramiddrop", 0.3, None, {"drop_duplicates": True}, "drop_duplicates is for methods that drop before"),
            (
                "prumerge",
                None,
                None,
                {"adaptive": True, "budget": "effective_rank", "reference_rank": 9.0},
                "take none",
            ),
            ("downsample", 0.1, None, {"drop_duplicates": True}, "averages whole maps"),
        ],
    )
    def test_wrong_combinations_are_answered_in_one_sentence(self, method, ratio, layer, options, said):
        with pytest.raises(ValueError, match=said):
            PruningConfig(method, ratio, layer, options)

    def test_a_drop_at_the_first_layers_input_is_not_one_before_the_decoder(self, monkeypatch):
        monkeypatch.setitem(registry._TARGETS, "at_the_first_layer", f"{__name__}:AtTheFirstLayer")
        with pytest.raises(ValueError, match="budget=effective_rank is for methods that drop before the decoder"):
            adaptive(4.0, method="at_the_first_layer")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_tokens_that_are_not_finite_are_refused_as_ever(self, value):
        x = tokens(0)
        x[3, 2] = value
        with pytest.raises(ValueError, match="Visual tokens contain NaN or infinite values"):
            reduce_images(adaptive(4.0).build_pruner(), [ImageTokens(x)], 0.4)

    @can_be_pruned
    def test_its_reference_is_of_tiles_where_each_has_a_budget_of_its_own(self):
        looking = TransformersEncoder(tiny("smolvlm").model, tiny_processor("smolvlm"))
        image = noise(100, 60)
        ranks = ranks_of(looking, [image])
        with torch.no_grad(), pruning(looking.model, adaptive(reference_rank(ranks), 0.3)) as session:
            looking.model(**looking._inputs([image]))
            totals, kept = zip(*session.visual_token_counts, strict=True)
        assert totals == tuple(total for total, _ in ranks) and len(totals) > 1
        assert sum(kept) / sum(totals) == pytest.approx(0.3, abs=0.5 * len(totals) / sum(totals))

    def test_its_reference_is_measured_by_a_command(self, tmp_path, capsys):
        for number, color in enumerate(("white", "black")):
            Image.new("RGB", (40, 30), color).save(tmp_path / f"{number}.png")
        assert rank_main(["--image-folder", str(tmp_path), "--images", "2"]) == 0
        first, last = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{tmp_path}: 2 images, mean ") and float(last.removeprefix("reference_rank=")) >= 1


def screenshot(seed: int, side: int = 56, patch: int = 14) -> torch.Tensor:
    """Pixels (3, side, side) of which many patches are equal."""
    draw = random.Random(seed)
    kinds = torch.randn(draw.randint(1, 6), 3, patch, patch, generator=torch.Generator().manual_seed(seed))
    across = side // patch
    rows = [torch.cat([kinds[draw.randrange(len(kinds))] for _ in range(across)], dim=2) for _ in range(across)]
    return torch.cat(rows, dim=1)


class TestDuplicates:
    def test_ids_are_equal_where_all_pixels_are(self):
        for seed in range(20):
            image = screenshot(seed)
            [ids] = patch_ids(patch_rows(image[None], 14))
            patches = [image[:, r : r + 14, c : c + 14] for r in range(0, 56, 14) for c in range(0, 56, 14)]
            for i, one in enumerate(patches):
                assert [bool(ids[i] == ids[j]) for j in range(16)] == [torch.equal(one, other) for other in patches]

    def test_the_first_of_each_and_all_without_a_patch_are_left(self):
        for seed in range(50):
            draw = random.Random(seed)
            ids = [draw.randint(0, 5) for _ in range(draw.randint(1, 30))]
            expected = [i for i, one in enumerate(ids) if one == NO_PATCH or one not in ids[:i]]
            assert distinct(torch.tensor(ids)).tolist() == expected

    @pytest.mark.parametrize("method", [name for name in BEFORE if name != "downsample"])
    def test_two_of_a_kind_never_both_stay_and_the_budget_holds_for_what_is_left(self, method):
        """With a budget above the number of distinct patches, all of these stay and no more."""
        for seed in range(12):
            draw = random.Random(seed)
            ids, ratio = torch.tensor([draw.randint(1, 6) for _ in range(20)]), draw.choice((0.1, 0.2, 0.5, 1.0))
            pruner = PruningConfig(method, ratio, options={"drop_duplicates": True}).build_pruner()
            image = ImageTokens(tokens(seed), None, {"patch_ids": ids, "image_keys": seed})
            [kept] = reduce_images(pruner, [image], ratio)
            chosen = ids[kept.indices].tolist()
            assert len(set(chosen)) == len(chosen) == min(kept_count(20, ratio), len(set(ids.tolist())))

    def test_a_model_compares_the_pixels_that_it_is_given(self, model):
        images = torch.stack([screenshot(seed) for seed in range(6)])
        ids, mask = pad_rows([prompt(2, 3, seed=seed) for seed in range(6)])
        with torch.no_grad(), pruning(model, "otprune", ratio=1.0, drop_duplicates=True):
            model(ids, attention_mask=mask, images=images)
            kinds = [len({row.numpy().tobytes() for row in patch_rows(one[None], 14)[0]}) for one in images]
            assert model.visual_token_counts == [(16, kind) for kind in kinds]

    def test_crops_are_compared_with_one_another_and_newlines_stay(self, anyres):
        crops = torch.stack([screenshot(1), *(screenshot(seed) for seed in (1, 2, 2, 3))])
        with torch.no_grad(), pruning(anyres, "uniform", ratio=1.0, drop_duplicates=True):
            anyres(prompt(2, 3)[None], images=[crops], image_sizes=[(112, 112)])
            kinds = {row.numpy().tobytes() for one in crops for row in patch_rows(one[None], 14)[0]}
            assert anyres.visual_token_counts == [(16 + 8 * 9, len(kinds) + 8)]

    def test_features_without_pixels_are_refused(self):
        with pytest.raises(ValueError, match="needs patch_ids beside the visual tokens, which only a model gives"):
            select(tokens(0), ratio=0.5, drop_duplicates=True)
