"""PruMerge, PruMerge+ and Downsample: the published tokens, exact budgets, and what each merged token is made of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
import torch

from golden import golden_root
from llava.pruning import VisualTokens
from llava.pruning.methods.downsample import Downsample, cut, pooled_layout, pooled_map, strips_of_cells
from llava.pruning.methods.importance import most_important
from llava.pruning.methods.prumerge import (
    PruMerge,
    PruMergePlus,
    evenly_spaced,
    grid_step,
    merge_into,
    outlier_count,
)
from llava.pruning.tokens import TokenGrid, crop_numbers

FILE = golden_root() / "pruning" / "attention_methods.json"
GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {}
METHODS = [PruMerge, PruMergePlus, Downsample]
ANYRES = (TokenGrid(4, 4), TokenGrid(6, 7, newline="row", crop_side=4))


def golden_cases(*variants):
    cases = [case for case in GOLDEN.get("prumerge", []) if case["key"].split("/")[2] in variants]
    return [pytest.param(case, id=case["key"]) for case in cases]


def stored(case, name):
    return torch.from_numpy(np.load(FILE.with_suffix(".npz"))[f"{case['key']}/{name}"])


def float32(array, sha):
    array = np.ascontiguousarray(array, dtype=np.float32)
    assert hashlib.sha256(array.tobytes()).hexdigest() == sha
    return torch.from_numpy(array)


def golden_inputs(case):
    """features (1, 576, C), keys (1, 576, C) and [CLS] attention (1, 576) of a golden case."""
    draw = np.random.default_rng([GOLDEN["base_seed"], 3, int(case["key"].split("/")[1][-1])])
    width = case["C"]
    features = draw.standard_normal((1, 577, width)).astype(np.float32)
    keys = draw.standard_normal((1, 577, width)).astype(np.float32)
    queries, importance = draw.standard_normal((1, 577, width)), draw.standard_normal(577)
    keys[0, :, 0] = keys[0, :, 0] * np.float32(0.5) + importance
    queries[:, :, 0] = case["scale"] * math.sqrt(width) / 4
    features, keys = float32(features, case["sha_feat"]), float32(keys, case["sha_k"])
    queries = float32(queries, case["sha_q"])
    attention = torch.softmax(queries[:, :1] @ keys.mT / math.sqrt(width), dim=-1)[:, 0, 1:]
    return features[:, 1:], keys[:, 1:], attention


def scene(batch=2, n=36, k=9, seed=0, dtype=torch.float32, layout=None, width=12):
    draw = torch.Generator().manual_seed(seed)
    attention = torch.rand(batch, n, generator=draw) ** 4
    keys = torch.randn(batch, n, 8, generator=draw)
    features = torch.randn(batch, n, width, generator=draw).to(dtype)
    crops = None
    if layout is not None:
        newline = torch.cat([part.is_newline() for part in layout])
        keys[:, newline], attention[:, newline] = 0, 0
        features[:, newline] = 5
        crops = crop_numbers(layout).repeat(batch, 1)
    attention = attention / attention.sum(dim=1, keepdim=True)
    return VisualTokens(
        features, k, layout=layout, crops=crops, final_cls_attention=attention, final_keys=keys.to(dtype)
    )


def with_k(tokens, k):
    return dataclasses.replace(tokens, k=k)


def rows(tokens, row):
    parts = {name: getattr(tokens, name)[row : row + 1] for name in ("features", "final_cls_attention", "final_keys")}
    return dataclasses.replace(tokens, crops=None, **parts)


class TestPublishedTokens:
    """Sums of 32 to 500 float32 terms of size 1 in another order: 1e-4."""

    @pytest.mark.parametrize("case", golden_cases("fixed8", "adaptive"))
    def test_prumerge(self, case):
        features, keys, attention = golden_inputs(case)
        expected, adaptive = stored(case, "tokens"), case["key"].endswith("/adaptive")
        tokens = VisualTokens(features, expected.shape[1], final_cls_attention=attention, final_keys=keys)
        kept = PruMerge(adaptive=adaptive).reduce(tokens)
        assert kept.indices[:, :-1].tolist() == stored(case, "idx").tolist()
        torch.testing.assert_close(kept.features, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("case", golden_cases("plus_adaptive"))
    def test_prumerge_plus_with_its_own_budget(self, case):
        features, keys, attention = golden_inputs(case)
        tokens = VisualTokens(features, 576, final_cls_attention=attention, final_keys=keys)
        kept = PruMergePlus(adaptive=True).reduce(tokens)
        published = stored(case, "idx").long()
        if 575 % grid_step(576, round(case["outlier_ratio"] * 576)):
            assert kept.indices[:, :-1].tolist() == published.tolist()
            torch.testing.assert_close(kept.features, stored(case, "tokens"), rtol=1e-4, atol=1e-4)
        else:
            # The published grid ends in front of the last token, also where that is its turn.
            assert set(kept.indices[0].tolist()) >= {*published[0].tolist(), 575}
            merged = merge_into(features, keys, attention, published)
            torch.testing.assert_close(merged, stored(case, "tokens"), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("case", golden_cases("plus_fixed8"))
    def test_prumerge_plus_with_a_budget_up_to_what_the_published_code_takes_twice(self, case):
        """It spaces the grid over all tokens; for each that is taken twice, the lowest one of the dropped is lost."""
        features, keys, attention = golden_inputs(case)
        published = stored(case, "idx").long()
        ranked = most_important(attention)[:, :72]
        assert torch.cat([ranked, torch.arange(4, 575, 8)[None]], dim=1).tolist() == published.tolist()
        dropped = sorted(set(range(576)) - set(published[0].tolist()))
        twice = 144 - len(published.unique())
        listed = [*published[0].tolist(), *dropped[twice:]]
        merged = merge_into(features[:, listed], keys[:, listed], attention[:, listed], torch.arange(144)[None])
        torch.testing.assert_close(merged, stored(case, "tokens"), rtol=1e-4, atol=1e-4)

        tokens = VisualTokens(features, 145, final_cls_attention=attention, final_keys=keys)
        kept = PruMergePlus().reduce(tokens)
        assert kept.indices[:, :72].tolist() == ranked.tolist()
        assert kept.indices.unique().numel() == 145

    @pytest.mark.parametrize("case", golden_cases("adaptive"))
    def test_the_number_of_outliers(self, case):
        attention = golden_inputs(case)[2]
        assert outlier_count(attention[0]) == round(case["outlier_ratio"] * 576) == stored(case, "idx").shape[1]


class TestEveryMergingMethod:
    @pytest.mark.parametrize("method", METHODS)
    def test_half_precision_only_rounds_the_result(self, method):
        tokens = scene(n=49, k=12)
        half = {"features": tokens.features.half(), "final_keys": tokens.final_keys}
        exact = method().reduce(dataclasses.replace(tokens, features=tokens.features.half().float()))
        rounded = method().reduce(dataclasses.replace(tokens, **half))
        assert rounded.indices.tolist() == exact.indices.tolist()
        assert torch.equal(rounded.features, exact.features.half())


class TestPruMerge:
    def test_a_kept_token_takes_in_its_neighbours_and_the_last_one_the_rest(self):
        """Six tokens in two groups of three, with a key a group; the two with the most attention are kept."""
        keys = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)[None]
        attention = torch.tensor([[0.1, 0.3, 0.05, 0.25, 0.15, 0.15]])
        features = torch.eye(6)[None]
        merged = merge_into(features, keys, attention, torch.tensor([[1, 3]]), neighbours=2)
        expected = [[0.1, 1, 0.05, 0, 0, 0], [0, 0, 0, 1, 0.15, 0.15], [0.1, 0, 0.05, 0, 0.15, 0.15]]
        torch.testing.assert_close(merged[0], torch.tensor(expected))

    def test_tokens_go_on_in_descending_attention_and_the_last_stands_at_the_best_dropped_one(self):
        tokens = scene(k=9)
        order = tokens.final_cls_attention.argsort(dim=1, descending=True)
        assert PruMerge().reduce(tokens).indices.tolist() == order[:, :9].tolist()

    def test_with_a_budget_of_one_the_picture_is_its_attention_weighted_sum(self):
        tokens = scene(k=1)
        expected = torch.einsum("bn,bnd->bd", tokens.final_cls_attention, tokens.features)
        for method in (PruMerge, PruMergePlus):
            torch.testing.assert_close(method().reduce(tokens).features[:, 0], expected)

    def test_equal_attention_goes_to_the_lowest_index(self):
        tokens = scene(k=5)
        tokens.final_cls_attention[:] = 1 / 36
        assert PruMerge().reduce(tokens).indices.tolist() == [[0, 1, 2, 3, 4]] * 2

    @pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
    def test_newlines_stay_out_of_it(self, method):
        tokens = scene(n=sum(map(len, ANYRES)), layout=ANYRES)
        newline = torch.cat([part.is_newline() for part in ANYRES])
        few = method().reduce(with_k(tokens, 30))
        assert not newline[few.indices].any()
        other = tokens.features.clone()
        other[:, newline] = -7
        assert torch.equal(method().reduce(dataclasses.replace(tokens, k=30, features=other)).features, few.features)
        # Beyond the 58 patches newlines come, as they are.
        many = method().reduce(with_k(tokens, 62))
        came = many.features[:, :-1][newline[many.indices[:, :-1]]]
        assert len(came) > 0 and (came == 5).all()

    def test_crops_can_have_a_share_each(self):
        tokens = scene(n=sum(map(len, ANYRES)), k=16, layout=ANYRES)
        kept = PruMerge(per_crop=True).reduce(tokens)
        counts = tokens.crops.gather(1, kept.indices)[0].bincount()
        assert counts.tolist() == [4, 4, 4, 2, 2]
        base = PruMerge().reduce(
            VisualTokens(
                tokens.features[:, :16],
                4,
                final_cls_attention=tokens.final_cls_attention[:, :16],
                final_keys=tokens.final_keys[:, :16],
            )
        )
        assert torch.equal(kept.features[:, :4], base.features)


class TestPruMergePlus:
    def test_half_is_ranked_and_half_is_evenly_spaced_over_the_rest(self):
        tokens = scene(batch=1, n=36, k=9)
        tokens.final_cls_attention[:] = torch.linspace(1, 0, 36)
        kept = PruMergePlus().reduce(tokens)
        # 32 left behind the first four: eight of them to each of the four.
        assert kept.indices.tolist() == [[0, 1, 2, 3, 8, 16, 24, 32, 4]]

    def test_evenly_spaced_fills_up_where_candidates_are_few(self):
        seen, taken = torch.ones(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
        seen[0, 4:] = False
        taken[:, :2] = True
        assert evenly_spaced(taken, seen, 3).tolist() == [[2, 3, 4], [3, 5, 7]]

    def test_a_grid_has_a_spacing_of_one_at_least(self):
        assert [grid_step(576, outliers) for outliers in (1, 48, 96, 97, 144, 576)] == [192, 4, 2, 1, 1, 1]


class TestAdaptiveBudget:
    @pytest.mark.parametrize("method, count", [(PruMerge, 2), (PruMergePlus, 4)])
    def test_a_picture_without_outliers_keeps_one_and_the_rest(self, method, count):
        tokens = scene(batch=1, n=36, k=36)
        tokens.final_cls_attention[:] = 1 / 36
        kept = method(adaptive=True).reduce(tokens)
        assert kept.indices.shape == (1, count) and kept.indices.unique().numel() == count

    def test_every_picture_has_a_number_of_its_own(self):
        tokens = scene(batch=2, n=64)
        tokens.final_cls_attention[:] = 0.01
        tokens.final_cls_attention[0, [5, 9]] = 0.1
        tokens.final_cls_attention[1, [2, 60, 61]] = 0.1
        kept = [PruMerge(adaptive=True).reduce(rows(tokens, row)).indices.tolist() for row in range(2)]
        assert kept == [[[5, 9, 0]], [[2, 60, 61, 0]]]
        with pytest.raises(ValueError, match="one image at a time, not 2"):
            PruMerge(adaptive=True).reduce(tokens)

    def test_with_a_grid_of_every_token_nothing_is_left_to_sum_up(self):
        tokens = scene(batch=1, n=64, k=64)
        tokens.final_cls_attention[:] = 0.01
        tokens.final_cls_attention[0, :12] = 0.1
        kept = PruMergePlus(adaptive=True).reduce(tokens)
        assert sorted(kept.indices[0].tolist()) == list(range(64)) and kept.features.shape == (1, 64, 12)

    @pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
    def test_newlines_are_no_part_of_the_statistics(self, method):
        tokens = scene(batch=1, n=sum(map(len, ANYRES)), layout=ANYRES)
        newline = torch.cat([part.is_newline() for part in ANYRES])
        parts = {name: getattr(tokens, name)[:, ~newline] for name in ("features", "final_cls_attention", "final_keys")}
        patches = method(adaptive=True).reduce(VisualTokens(k=9, **parts))
        found = method(adaptive=True).reduce(tokens)
        if method is PruMerge:
            assert torch.equal(found.features, patches.features)
        assert not newline[found.indices].any()

    @pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
    def test_a_budget_of_its_own_goes_with_no_ratio_and_no_layer(self, method):
        assert method(adaptive=True).varies and not method().varies
        method().check_budget(0.1, None)
        method(adaptive=True).check_budget(None, None)
        with pytest.raises(ValueError, match="SUBSET_RATIO"):
            method().check_budget(None, None)
        with pytest.raises(ValueError, match=r"SUBSET_RATIO\), which is 0.1"):
            method(adaptive=True).check_budget(0.1, None)
        with pytest.raises(ValueError, match="must be 0 or left out, not 2"):
            method(adaptive=True).check_budget(None, 2)
        assert method(adaptive=True).schedule_for(None, None, 32) == ((0, 1.0),)
        assert method().schedule_for(0.1, 2, 32) == ((2, 0.1),)


class TestDownsample:
    def test_a_budget_that_divides_the_grid_is_average_pooling(self):
        tokens = scene(n=144, k=16)
        picture = tokens.features.mT.reshape(2, 12, 12, 12)
        expected = torch.nn.functional.avg_pool2d(picture, 3).flatten(2).mT
        kept = Downsample().reduce(tokens)
        torch.testing.assert_close(kept.features, expected)
        assert kept.indices[0].tolist() == [12 * row + column for row in (1, 4, 7, 10) for column in (1, 4, 7, 10)]

    @pytest.mark.parametrize("newline", ["none", "row", "end"])
    @pytest.mark.parametrize("rows, columns", [(1, 1), (1, 9), (9, 1), (2, 2), (5, 8), (8, 5), (7, 7), (3, 10)])
    def test_the_cells_partition_a_map_for_every_budget(self, rows, columns, newline):
        part = TokenGrid(rows, columns, newline)
        patch = ~part.is_newline()
        for share in range(1, len(part) + 1):
            owner, places = pooled_map(part, share)
            assert owner[places].tolist() == list(range(share))
            assert (places.diff() > 0).all()
            assert (owner[patch] >= 0).all()
            area = owner[patch].bincount(minlength=share)
            area = area[area > 0]
            # A strip and a column are a patch more or less than their neighbours, at worst 2 x 2 against 1 x 1.
            assert area.max() <= 4 * area.min()
            cells, newlines = strips_of_cells(rows, columns, share, newline)
            assert newlines == share - sum(cells) == share - len(area)
            if newline == "row":
                assert len(cells) - 1 <= newlines <= len(cells)

    def test_cells_are_as_square_as_may_be(self):
        assert strips_of_cells(24, 24, 56, "none")[0] == [7, 7, 10, 7, 9, 7, 9]
        assert strips_of_cells(24, 24, 144, "none")[0] == [12] * 12
        assert strips_of_cells(12, 48, 16, "none")[0] == [8, 8]
        assert strips_of_cells(24, 36, 2 * 4, "row") == ([3, 3], 2)

    def test_pieces_of_a_line_differ_by_one_at_most(self):
        for parts in range(1, 25):
            assert set(cut(24, parts).bincount().tolist()) <= {24 // parts, -(-24 // parts)}

    def test_every_pooled_row_ends_with_the_newline_of_its_map(self):
        tokens = scene(n=sum(map(len, ANYRES)), k=17, layout=ANYRES)
        kept = Downsample().reduce(tokens)
        newline = torch.cat([part.is_newline() for part in ANYRES])[kept.indices[0]]
        # 16 and 48 tokens: 4 of the budget for the base view; 13 for the crops, three rows of cells and a newline each.
        assert newline.tolist() == ([False] * 4 + ([False] * 4 + [True]) + ([False] * 3 + [True]) * 2)
        torch.testing.assert_close(kept.features[:, newline], torch.full((2, 3, 12), 5.0))
        patches = tokens.features[:, 16:].unflatten(1, (6, 8))[:, :, :7]
        torch.testing.assert_close(kept.features[:, 4], patches[:, :2, :1].mean(dim=(1, 2)))

    def test_the_whole_budget_is_the_picture_itself(self):
        layout = (TokenGrid(3, 4, "row"), TokenGrid(2, 5, "end"))
        owner, places = pooled_layout(layout, 26)
        assert owner.tolist() == places.tolist() == list(range(26))

    def test_a_map_without_a_share_is_left_out(self):
        tokens = scene(n=37, k=1, layout=(TokenGrid(1, 1), TokenGrid(6, 6)))
        torch.testing.assert_close(Downsample().reduce(tokens).features[:, 0], tokens.features[:, 1:].mean(dim=1))

    def test_tokens_without_a_layout_are_a_square_or_a_row(self):
        square = Downsample().reduce(scene(n=16, k=4)).indices[0]
        row = Downsample().reduce(scene(n=12, k=4)).indices[0]
        assert square.tolist() == [0, 2, 8, 10] and row.tolist() == [1, 4, 7, 10]

    def test_crop_by_crop_every_crop_is_pooled_to_its_share(self):
        tokens = scene(n=sum(map(len, ANYRES)), k=16, layout=ANYRES)
        kept = Downsample(per_crop=True).reduce(tokens)
        counts = tokens.crops.gather(1, kept.indices)[0].bincount()
        assert counts.tolist() == [4, 4, 4, 2, 2]
        base = Downsample().reduce(VisualTokens(tokens.features[:, :16], 4))
        assert torch.equal(kept.features[:, :4], base.features)
