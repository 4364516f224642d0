"""What a run kept and cost: counted an image and a prompt, summed over tasks and processes, and said in one line."""

from __future__ import annotations

import subprocess
import sys

from lmms_eval_otprune.models.token_counts import ImageCount, PromptCount, describe, merged_summary, summary

from llava.flops import DecoderShape, ModelShape, TowerShape, exact_flops, literature_flops

SHAPE = ModelShape.llava(
    DecoderShape.llama(hidden=8, intermediate=16, layers=4, query_width=8, key_width=8, vocabulary=32),
    TowerShape(hidden=4, intermediate=8, layers=2, patches=16, patch_values=12, outputs=16),
    projector_layers=2,
)
WHOLE = ImageCount(16, ((4, 16),))
BEFORE = ImageCount(16, ((4, 4),))
INSIDE = ImageCount(16, ((2, 16), (2, 4)))


class TestImageCount:
    def test_puts_neighbouring_layers_with_as_many_tokens_together(self):
        image = ImageCount.of(576, (576, 576, 288, 288, 288, 0))
        assert image.runs == ((2, 576), (3, 288), (1, 0))
        assert image.per_layer == [576, 576, 288, 288, 288, 0]

    def test_knows_what_left_behind_an_attention_where_something_did(self):
        image = ImageCount.of(16, (16, 12, 7), 1, (12, 7, 7))
        assert image.per_layer == [16, 12, 7] and image.after_attention == [12, 7, 7]
        assert ImageCount.of(16, (8, 8), 1, (8, 8)) == ImageCount.of(16, (8, 8)) == ImageCount(16, ((2, 8),))
        assert ImageCount(16, ((2, 8),)).after_attention == [8, 8]

    def test_keeps_the_mean_over_the_layers_of_what_is_present(self):
        assert (BEFORE.kept, BEFORE.entering) == (4, 4)
        assert (INSIDE.kept, INSIDE.entering) == (10, 16)


class TestSummary:
    def test_of_images_has_their_extremes_and_means(self):
        found = summary({PromptCount(10, (BEFORE,)): 3, PromptCount(12, (ImageCount(32, ((4, 8),)),)): 1})
        assert found["images"] == 4
        assert found["total"] == {"min": 16, "mean": 20, "max": 32}
        assert found["kept"] == {"min": 4, "mean": 5, "max": 8}
        assert found["per_layer"] == [5, 5, 5, 5]

    def test_tells_the_layers_apart(self):
        found = summary({PromptCount(10, (INSIDE,)): 5})
        assert found["per_layer"] == [16, 16, 4, 4]
        assert found["kept"]["mean"] == 10

    def test_costs_what_the_prompts_cost_together(self):
        found = summary({PromptCount(10, (INSIDE,)): 2, PromptCount(50, (BEFORE,)): 1}, SHAPE)
        pruned, unpruned = [[26, 26, 14, 14]] * 2 + [[54] * 4], [[26] * 4] * 2 + [[66] * 4]
        for convention, cost in (
            ("literature", lambda tokens: literature_flops(SHAPE.decoder, tokens)),
            ("exact", lambda tokens: exact_flops(SHAPE, tokens).total),
        ):
            sums = [sum(map(cost, prompts)) for prompts in (pruned, unpruned)]
            assert found["flops"][convention] == {"pruned": sums[0], "unpruned": sums[1]}
            assert found["flops_ratio"][convention] == sums[0] / sums[1]

    def test_counts_what_leaves_behind_an_attention_in_that_layer_already(self):
        image = ImageCount.of(16, (16, 12, 7, 7), 1, (12, 7, 7, 3))
        found = summary({PromptCount(10, (image,)): 2}, SHAPE)["flops"]
        tokens, behind = [26, 22, 17, 17], [22, 17, 17, 13]
        assert found["exact"]["pruned"] == 2 * exact_flops(SHAPE, tokens, after=behind).total
        assert found["literature"]["pruned"] == 2 * literature_flops(SHAPE.decoder, tokens, after=behind)

    def test_adds_up_the_images_of_one_prompt_and_their_crops(self):
        images = (INSIDE, ImageCount(32, ((1, 32), (3, 2)), crops=5))
        found = summary({PromptCount(10, images): 1}, SHAPE)
        assert found["images"] == 2
        exact = exact_flops(SHAPE, [58, 28, 16, 16], crops=6).total, exact_flops(SHAPE, [58] * 4, crops=6).total
        assert found["flops"]["exact"] == {"pruned": exact[0], "unpruned": exact[1]}

    def test_of_an_unpruned_run_costs_as_much_as_unpruned(self):
        assert summary({PromptCount(10, (WHOLE,)): 7}, SHAPE)["flops_ratio"] == {"literature": 1.0, "exact": 1.0}

    def test_leaves_out_prompts_without_images(self):
        alone = summary({PromptCount(10, (BEFORE,)): 1}, SHAPE)
        assert summary({PromptCount(10, (BEFORE,)): 1, PromptCount(900, ()): 4}, SHAPE) == alone
        assert summary({PromptCount(900, ()): 4}, SHAPE) is None
        assert summary({}, SHAPE) is None

    def test_without_sizes_has_no_cost(self):
        found = summary({PromptCount(10, (BEFORE,)): 1})
        assert (found["flops"], found["flops_ratio"]) == (None, None)


ONE_TASK = {PromptCount(10, (BEFORE,)): 1, PromptCount(20, (INSIDE,)): 1}
ANOTHER_TASK = {PromptCount(30, (ImageCount(32, ((4, 8),)),)): 2}


class TestMergedSummary:
    def test_is_that_of_all_prompts(self):
        parts = [summary(prompts, SHAPE) for prompts in (ONE_TASK, ANOTHER_TASK)]
        assert merged_summary(parts) == summary({**ONE_TASK, **ANOTHER_TASK}, SHAPE)

    def test_of_nothing_is_nothing(self):
        assert merged_summary([]) is None

    def test_with_an_older_part_has_what_both_have(self):
        older = {
            "images": 2,
            "total": {"min": 32, "mean": 32.0, "max": 32},
            "kept": {"min": 8, "mean": 8.0, "max": 8},
        }
        merged = merged_summary([summary(ONE_TASK, SHAPE), older])
        assert merged["kept"] == {"min": 4, "mean": 7.5, "max": 10}
        assert (merged["per_layer"], merged["flops"], merged["flops_ratio"]) == (None, None, None)


class TestDescription:
    def test_says_kept_tokens_layers_and_cost(self):
        counts = summary({PromptCount(10, (ImageCount(576, ((2, 576), (6, 56))),)): 3})
        counts["flops_ratio"] = {"literature": 0.2346, "exact": 0.3}
        assert describe(counts) == (
            "186 of 576 visual tokens an image (mean over the decoder layers: 576 x2, 56 x6), "
            "prefill FLOPs 30.0 % of unpruned (23.5 % as papers count)"
        )

    def test_leaves_equal_layers_and_unknown_costs_out(self):
        assert describe(summary({PromptCount(10, (BEFORE,)): 1})) == "4 of 16 visual tokens an image"


def test_counting_needs_nothing_heavy_at_import():
    program = "import sys, lmms_eval_otprune.models.token_counts; print('torch' in sys.modules, 'llava' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
