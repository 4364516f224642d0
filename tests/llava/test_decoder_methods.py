"""PyramidDrop, SparseVLM and VTW: their mathematics against the published code, and what they leave."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch

from golden import golden_root
from llava.pruning import VisualTokens, kept_count
from llava.pruning.methods.pyramiddrop import PUBLISHED, PyramidDrop
from llava.pruning.methods.sparsevlm import (
    RANKED,
    SparseVLM,
    density_peaks,
    merge_clusters,
    published_schedule,
    recycled_counts,
    select_raters,
    split_budget,
)
from llava.pruning.methods.vtw import VTW
from llava.pruning.schedule import kept_per_layer, mean_fraction

FILE = golden_root() / "pruning" / "attention_methods.json"
GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {}
PYRAMID = GOLDEN.get("pyramiddrop", [])
SPARSE = GOLDEN.get("sparsevlm", {"score": [], "cluster": [], "raters": []})
METHODS = [
    pytest.param(PyramidDrop(), id="pyramiddrop"),
    pytest.param(SparseVLM(), id="sparsevlm"),
    pytest.param(SparseVLM(recycle=False), id="sparsevlm-without-recycling"),
]


@pytest.fixture(scope="module")
def arrays():
    return np.load(FILE.with_suffix(".npz"))


def draw(seed: list[int], shape: tuple[int, ...], digest: str) -> torch.Tensor:
    """Cubes of uniform numbers, checked against the digest of what the published code was given."""
    row = np.random.default_rng([GOLDEN["base_seed"], *seed]).random(shape)
    row = (row * row * row).astype(np.float32)
    assert hashlib.sha256(row.tobytes()).hexdigest() == digest
    return torch.from_numpy(row)


def tokens_of(features: torch.Tensor, k: int, seed: int = 0) -> VisualTokens:
    """Random attention beside the features."""
    generator = torch.Generator().manual_seed(seed)
    batch, n, _ = features.shape
    return VisualTokens(
        features,
        k,
        next_attention=torch.rand(batch, n, 3, generator=generator),
        rater_attention=torch.rand(batch, n, generator=generator),
    )


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", [pytest.param(case, id=case["key"]) for case in PYRAMID])
def test_pyramiddrop_keeps_the_published_tokens(case, arrays):
    number, stage = (int(part[-1]) for part in case["key"].split("/")[1:])
    first = case["image_index"]
    attention = draw([10, number, stage], (case["H"], 1, first + case["n_in"] + 20), case["sha"])
    visual = attention[:, 0, first : first + case["n_in"]].T[None]  # (1, N, H)
    pruner = PyramidDrop(schedule="published")
    k = pruner.kept_count(case["n0"], PUBLISHED[stage][1])
    kept = pruner.reduce(VisualTokens(torch.zeros(1, case["n_in"], 1), k, next_attention=visual))
    assert k == case["n_keep"]
    assert kept.indices[0].tolist() == (arrays[f"{case['key']}/kept_abs"].astype(int) - first).tolist()


@pytest.mark.parametrize("case", [pytest.param(case, id=case["key"]) for case in SPARSE["score"]])
def test_sparsevlm_keeps_the_published_tokens(case, arrays):
    first, n, text = case["v_start"], case["v_num"], case["T"]
    number = int(case["key"].removeprefix("sparsevlm/score"))
    rows = draw([7, number], (1, case["H"], text, first + n + text), case["sha"])
    raters = torch.from_numpy(arrays[f"{case['key']}/rater_idx"].astype(np.int64))
    relation = rows[:, :, raters, first : first + n].mean(dim=(1, 2))
    # a float32 mean of at most 32 numbers, in another order
    np.testing.assert_allclose(relation, arrays[f"{case['key']}/relation"], rtol=1e-6)
    tokens = VisualTokens(torch.zeros(1, n, 1), case["kept"], rater_attention=relation)
    mask = np.unpackbits(arrays[f"{case['key']}/mask"], axis=-1)[0, :n]
    assert SparseVLM(recycle=False).indices(tokens)[0].tolist() == np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("case", [pytest.param(case, id=f"cluster{case['case']}") for case in SPARSE["cluster"]])
def test_sparsevlm_merges_as_published(case, arrays):
    x, noise, expected = (
        torch.from_numpy(arrays[f"sparsevlm/cluster{case['case']}/{name}"]) for name in ("x", "noise", "merged")
    )
    _, assignment = density_peaks(x, case["cluster_num"], noise)
    # the published mean divides by the count and 1e-6
    torch.testing.assert_close(
        merge_clusters(x, assignment, case["cluster_num"]), expected, rtol=3e-6, atol=1e-6, check_dtype=True
    )


@pytest.mark.parametrize("case", [pytest.param(case, id=f"raters{case['case']}") for case in SPARSE["raters"]])
def test_sparsevlm_chooses_the_published_raters(case, arrays):
    text = 35 + case["n_visual"]
    generator = np.random.default_rng([GOLDEN["base_seed"], 9, case["case"]])
    embedded = (0.3 * generator.standard_normal((1, text + case["T"], case["C"]))).astype(np.float32)
    assert hashlib.sha256(embedded.tobytes()).hexdigest() == case["sha"]
    embedded = torch.from_numpy(embedded[0])
    chosen = SparseVLM().raters(embedded[35:text], embedded[text:])
    assert chosen.nonzero().flatten().tolist() == arrays[f"sparsevlm/raters{case['case']}/idx"].tolist()


def test_raters_are_the_words_that_the_picture_resembles():
    visual = torch.tensor([[4.0, 0.0], [4.0, 1.0]])
    text = torch.tensor([[0.0, 1.0], [2.0, 0.0], [-1.0, 0.0]])
    assert select_raters(visual, text).tolist() == [False, True, False]


@pytest.mark.parametrize("text", [1, 5])
def test_where_no_word_stands_out_all_are_raters(text):
    assert select_raters(gaussian(7, 4), torch.ones(text, 4)).all()


@pytest.mark.parametrize("recycle", [True, False], ids=["recycled", "dropped"])
@pytest.mark.parametrize("name", list(RANKED[True]))
def test_the_named_schedules_have_the_published_numbers_of_tokens(name, recycle):
    pruner = SparseVLM(schedule=name, recycle=recycle)
    stages = pruner.schedule_for(None, None, 32)
    assert [layer for layer, _ in stages] == [3, 7, 16]
    present = 576
    for (_, fraction), ranked in zip(stages, RANKED[recycle][name], strict=True):
        k = kept_count(576, fraction)
        if recycle:
            candidates, merged = recycled_counts(present - ranked)
            assert split_budget(present, k) == (ranked, candidates, merged)
        else:
            assert k == ranked
        present = k


def test_the_schedule_called_192_as_counted_by_hand():
    """276 dropped: 83 recycled into 9. 109 of 309: 33 into 4. 94 of 204: 29 into 3."""
    kept = kept_per_layer(SparseVLM(schedule="192").schedule_for(None, None, 32), 576, 32)
    assert kept == [576] * 3 + [309] * 4 + [204] * 9 + [113] * 16


def test_a_budget_is_split_so_that_it_is_met_and_mostly_kept():
    for n in range(2, 140):
        for k in range(1, n):
            kept, candidates, merged = split_budget(n, k)
            assert kept + merged == k
            assert merged <= k // 5 and merged <= candidates <= n - kept
            if merged:
                assert candidates == recycled_counts(n - kept)[0]


def test_clusters_are_the_heaps_and_merged_tokens_their_means():
    first = torch.tensor([[100.0, 0.1], [100.0, 0.0], [100.0, 0.0], [100.0, 0.3]])
    second = torch.tensor([[0.0, 100.0], [0.25, 100.0], [0.125, 100.0]])
    heaps = torch.cat([second, first])[None]
    centres, assignment = density_peaks(heaps, 2)
    # A token and its nearest make its density: the duplicates 4 and 5 are the densest, the other heap's are equal.
    assert centres.tolist() == [[4, 0]]
    assert assignment.tolist() == [[1, 1, 1, 0, 0, 0, 0]]
    expected = torch.stack([first.mean(dim=0), second.mean(dim=0)])
    torch.testing.assert_close(merge_clusters(heaps, assignment, 2)[0], expected)


def test_the_best_of_the_rest_are_merged_behind_the_kept_ones():
    """Of 30 tokens and a budget of 10, 9 are kept and the next 7 of the remaining 21 averaged into the last."""
    features = gaussian(1, 30, 4)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    relation = torch.zeros(1, 30)
    relation[0, order] = torch.linspace(1, 0, 30)
    assert split_budget(30, 10) == (9, 7, 1)
    kept = SparseVLM().reduce(VisualTokens(features, 10, rater_attention=relation))
    best = order[:9].sort().values
    assert kept.indices[0, :9].tolist() == best.tolist()
    assert kept.indices[0, 9] in order[9:16]
    torch.testing.assert_close(kept.features[0, :9], features[0, best])
    torch.testing.assert_close(kept.features[0, 9], features[0, order[9:16]].mean(dim=0))


def test_density_peaks_break_ties_towards_the_lowest_index_and_give_every_centre_its_cluster():
    centres, assignment = density_peaks(torch.ones(2, 6, 3), 3)
    assert centres.tolist() == [[0, 1, 2]] * 2
    assert assignment.tolist() == [[0, 1, 2, 0, 0, 0]] * 2


@pytest.mark.parametrize("pruner", METHODS)
def test_per_crop_every_crop_gets_its_share(pruner):
    crops = torch.tensor([0] * 10 + [1, 1, 1, 1, 1, 2, 2, 2, 2, 2] * 2)
    tokens = dataclasses.replace(tokens_of(gaussian(1, 30, 8), 15), crops=crops[None])
    kept = dataclasses.replace(pruner, per_crop=True).reduce(tokens)
    assert crops[kept.indices[0]].bincount().tolist() == [5, 5, 5]
    if pruner != SparseVLM():
        assert kept.indices[0].tolist() == sorted(kept.indices[0].tolist())


@pytest.mark.parametrize("pruner", METHODS)
def test_ties_go_to_the_lowest_index(pruner):
    tokens = VisualTokens(gaussian(1, 40, 4), 4, next_attention=torch.ones(1, 40, 2), rater_attention=torch.ones(1, 40))
    assert pruner.indices(tokens)[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pruner", [*METHODS, pytest.param(VTW(), id="vtw")])
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5, 0.75])
def test_the_ratio_is_the_mean_over_the_layers(pruner, ratio):
    pruner.check_budget(ratio, None)
    for num_layers in (8, 32, 40):
        stages = pruner.schedule_for(ratio, None, num_layers)
        tolerance = 0.5 / num_layers if isinstance(pruner, VTW) else 1e-12
        assert mean_fraction(stages, num_layers) == pytest.approx(ratio, abs=tolerance)
        assert stages[0][0] >= pruner.first_layer


@pytest.mark.parametrize("schedule", ["scaled", "published"])
def test_pyramiddrop_in_32_layers_is_the_published_schedule_at_its_mean(schedule):
    ratio = mean_fraction(PUBLISHED, 32) if schedule == "scaled" else None
    assert PyramidDrop(schedule=schedule).schedule_for(ratio, None, 32) == PUBLISHED
    assert mean_fraction(PUBLISHED, 32) == 15 / 32


@pytest.mark.parametrize(("n", "left"), [(576, [288, 144, 72]), (579, [289, 144, 72]), (7, [3, 1, 1])])
def test_pyramiddrop_rounds_the_published_budget_down(n, left):
    pruner = PyramidDrop(schedule="published")
    assert [pruner.kept_count(n, fraction) for _, fraction in PUBLISHED] == left
    assert PyramidDrop().kept_count(n, 0.5) == kept_count(n, 0.5)


def test_sparsevlm_scales_the_schedule_called_192():
    for recycle in (True, False):
        stages = published_schedule("192", recycle)
        assert SparseVLM(recycle=recycle).schedule_for(mean_fraction(stages, 32), None, 32) == stages


@pytest.mark.parametrize(
    ("scaled", "published", "variable"),
    [
        pytest.param(PyramidDrop(), PyramidDrop(schedule="published"), "PYRAMIDDROP_SCHEDULE", id="pyramiddrop"),
        pytest.param(SparseVLM(), SparseVLM(schedule="64"), "SPARSEVLM_SCHEDULE", id="sparsevlm"),
    ],
)
def test_a_schedule_takes_no_layer_and_only_the_scaled_one_takes_a_ratio(scaled, published, variable):
    scaled.check_budget(0.3, None)
    published.check_budget(None, None)
    with pytest.raises(ValueError, match=f"LAYER_INDEX=2.*several layers.*{variable}"):
        scaled.check_budget(0.3, 2)
    with pytest.raises(ValueError, match=f"SUBSET_RATIO is needed with {variable}=scaled"):
        scaled.check_budget(None, None)
    with pytest.raises(ValueError, match=rf"SUBSET_RATIO=0\.3 .*{variable}={published.schedule}"):
        published.check_budget(0.3, None)


@pytest.mark.parametrize("cls", [PyramidDrop, SparseVLM])
def test_an_unknown_schedule_is_refused_with_those_there_are(cls):
    with pytest.raises(ValueError, match=r"scaled.*not 'steep'"):
        cls(schedule="steep")


def test_vtw_withdraws_at_the_layer_or_at_the_ratio_of_the_layers():
    assert VTW().schedule_for(None, 15, 32) == ((15, 0.0),)
    assert VTW().schedule_for(0.5, None, 32) == ((16, 0.0),)
    assert VTW().schedule_for(0.001, None, 32) == ((1, 0.0),)
    assert kept_per_layer(VTW().schedule_for(0.5, None, 4), 9, 4) == [9, 9, 0, 0]


@pytest.mark.parametrize("ratio", [1.0, 0.99])
def test_vtw_withdraws_nothing_at_a_ratio_of_all_layers(ratio):
    ((layer, fraction),) = VTW().schedule_for(ratio, None, 8)
    assert layer < 8 and fraction == 1


@pytest.mark.parametrize(("ratio", "layer"), [(None, None), (0.5, 15)], ids=["neither", "both"])
def test_vtw_takes_a_layer_or_a_ratio(ratio, layer):
    VTW().check_budget(0.5, None)
    VTW().check_budget(None, 15)
    with pytest.raises(ValueError, match=r"LAYER_INDEX.*SUBSET_RATIO"):
        VTW().check_budget(ratio, layer)


def test_vtw_has_no_selection():
    with pytest.raises(NotImplementedError, match="withdraws all visual tokens"):
        VTW().reduce(VisualTokens(gaussian(1, 9, 4), 3))
