"""The fused GPU kernels choose as the plain versions do: in Triton's interpreter, or on a GPU where there is one.

For GPUs that are not here they are compiled, and not run.
"""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from compiled import bytes_spilled, compiled_for
from counting import count
from golden import golden_root
from golden_features import load_features
from interpreted import in_turns, interpreter
from live_bytes import LiveBytes
from llava.model import llava_arch
from llava.model.llava_arch import greedy_select, ot_kernel, ot_select
from llava.pruning import kernels, select, similarity
from llava.pruning.kernels import facility, greedy, max_min, symmetric
from llava.pruning.methods import divprune
from llava.pruning.methods.coverage import facility_select
from llava.pruning.methods.divprune import max_min_select
from llava.pruning.registry import method_class
from llava.pruning.similarity import cosine_similarity
from llava.pruning.tokens import VisualTokens
from no_waiting import no_waiting
from pretended_gpu import GPU, pretended_gpu
from selections import assert_is_greedy
from tilings import ot_kernel_in

ROOT = golden_root() / "pruning"
META = json.loads((ROOT / "selection_meta.json").read_text())["otprune"]
ON_GPU = torch.cuda.is_available()
GOLDEN = [key for key in META if key.endswith("/float32") and int(key.split("/")[1].split("x")[0]) <= 576]

FUSED = dict.fromkeys(("ot_kernel", "cosine_similarity"), symmetric)
FUSED |= {"greedy_select": greedy, "max_min_select": max_min, "facility_select": facility}

# Relative to the whole. A GPU's matrix units cut their sums off, by up to a unit in float32's last place a step.
PRECISION = 1e-5 if ON_GPU else 5e-7

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def run():
    """``run(function, *arguments)`` on the GPU, or where Triton interprets its kernels; the result is on the CPU."""
    if ON_GPU:
        yield lambda function, *arguments: function(
            *(value.cuda() if isinstance(value, torch.Tensor) else value for value in arguments)
        ).cpu()
        return
    with interpreter() as interpreted:
        try:
            assert interpreted(count, 3) == [0, 1, 2]
        except Exception as error:
            if "InterpreterError" not in f"{type(error)}":
                raise
            pytest.skip(f"this Triton does not interpret beside NumPy {np.__version__}: {error}")
        yield interpreted


@pytest.fixture(scope="module")
def run_blocks(run):
    """`run` for kernels whose blocks wait for each other."""
    return run if ON_GPU else lambda function, *arguments: run(in_turns, function, *arguments)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups(sizes: list[int]) -> torch.Tensor:
    """A kernel of duplicates: 1 between tokens of a group, 0 elsewhere. All that a greedy does to it is exact."""
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return (label[:, None] == label[None]).float()


class TestGreedy:
    @pytest.mark.parametrize(
        ("batch", "n", "d", "k"),
        [(1, 1, 3, 1), (1, 2, 3, 2), (1, 9, 4, 9), (3, 33, 7, 12), (2, 64, 80, 40), (1, 130, 20, 25)],
        ids=str,
    )
    def test_every_step_takes_the_largest_gain(self, run, batch, n, d, k):
        kernels = ot_kernel(random(batch, n, d), gamma=0.5)
        order = run(greedy.greedy_select, kernels, k)
        assert order.shape == (batch, k) and order.dtype == torch.int64
        for kernel, one in zip(kernels, order, strict=True):
            assert_is_greedy(kernel, one)

    def test_it_stops_anywhere(self, run):
        kernel = ot_kernel(random(1, 9, 30), gamma=1.0)
        orders = [run(greedy.greedy_select, kernel, k)[0].tolist() for k in range(1, 10)]
        assert all(order == orders[-1][: len(order)] for order in orders)

    def test_ties_go_to_the_lowest_index(self, run):
        diagonal = torch.tensor([1.0, 3, 2, 3, 0, 1, 3, -0.0, 0, 2] * 4)
        order = run(greedy.greedy_select, torch.diag(diagonal)[None], 40)[0]
        assert order.tolist() == diagonal.argsort(descending=True, stable=True).tolist()

    def test_what_duplicates_leave_is_taken_in_order(self, run):
        order = run(greedy.greedy_select, groups([3, 1, 4, 2])[None], 10)[0].tolist()
        assert order == [0, 3, 4, 8, 1, 2, 5, 6, 7, 9]

    def test_beyond_the_rank_tokens_are_still_distinct(self, run):
        x = random(2, 20, 3)
        for kernel, order in zip(x @ x.mT, run(greedy.greedy_select, x @ x.mT, 15), strict=True):
            assert_is_greedy(kernel, order)

    @pytest.mark.parametrize("spoilt", ["everything", "a row", "the diagonal"])
    def test_values_that_are_not_numbers_give_distinct_tokens(self, run, spoilt):
        kernel = ot_kernel(random(1, 40, 8))
        place = {"everything": ..., "a row": (0, 7), "the diagonal": (0, range(40), range(40))}[spoilt]
        kernel[place] = torch.nan
        order = run(greedy.greedy_select, kernel, 12)[0]
        assert len(order.unique()) == 12 and order.min() >= 0 and order.max() < 40

    def test_a_transposed_kernel_is_read_as_it_is_meant(self, run):
        kernel = ot_kernel(random(2, 24, 10), gamma=1.0)
        order = run(greedy.greedy_select, kernel, 8)
        assert torch.equal(run(greedy.greedy_select, kernel.mT, 8), order)

    @pytest.mark.parametrize("key", GOLDEN)
    def test_the_order_is_the_published_one(self, run, key):
        kernel = ot_kernel(load_features(ROOT, key.rsplit("/", 1)[0]))
        expected = np.load(ROOT / "otprune_selection.npz")[f"{key}/order_full"]
        order = run(greedy.greedy_select, kernel[None], max(2, len(kernel) // 10))[0]
        stable = min(len(order), META[key]["stable_prefix_1e-5"])
        assert order[:stable].tolist() == expected[:stable].tolist()
        assert_is_greedy(kernel, order)


class TestOneImageOfABatch:
    """It is the same as alone, to the last bit."""

    @pytest.mark.parametrize("batch", [8, 32])
    def test_its_kernel_and_its_choice(self, run, batch):
        x = random(batch, 40, 24)
        together = run(symmetric.ot_kernel, x, 4.5)
        order = run(greedy.greedy_select, together, 5)
        for image in (0, batch - 1):
            alone = run(symmetric.ot_kernel, x[image : image + 1], 4.5)
            assert torch.equal(alone[0], together[image])
            assert torch.equal(run(greedy.greedy_select, alone, 5)[0], order[image])

    def test_where_its_blocks_wait_for_each_other(self, run_blocks):
        kernels = ot_kernel(random(4, 45, 12), gamma=0.5)
        order = run_blocks(greedy.select_in_shape, kernels, 6, TestSeveralBlocks.SHAPE, 3)
        for image in (0, 3):
            alone = run_blocks(greedy.select_in_shape, kernels[image : image + 1], 6, TestSeveralBlocks.SHAPE, 3)
            assert torch.equal(alone[0], order[image])


class TestTheHost:
    def test_waits_for_no_step_of_a_kernel(self, run):
        kernel = ot_kernel(random(2, 20, 8))
        for function in (greedy.greedy_select, max_min.max_min_select):
            assert run(no_waiting, function, kernel, 6).shape == (2, 6)

    def test_would_be_caught_waiting(self, run):
        with pytest.raises(RuntimeError, match="the host would wait"):
            run(no_waiting, torch.Tensor.item, torch.tensor(1.0))


class TestSeveralBlocks:
    """An image over three blocks of 16 tokens, whose greedy needs all of them at every step."""

    SHAPE = greedy.Shape(blocks=3, columns=16, rows=4, warps=4)

    def test_every_step_takes_the_largest_gain(self, run_blocks):
        kernels = ot_kernel(random(2, 45, 12), gamma=0.5)
        for kernel, order in zip(kernels, run_blocks(greedy.select_in_shape, kernels, 14, self.SHAPE, 2), strict=True):
            assert_is_greedy(kernel, order)

    def test_ties_go_to_the_lowest_index_of_all_blocks(self, run_blocks):
        kernels = torch.stack([torch.eye(40), groups([20, 3, 17])])
        order = run_blocks(greedy.select_in_shape, kernels, 6, self.SHAPE, 1)
        assert order.tolist() == [[0, 1, 2, 3, 4, 5], [0, 20, 23, 1, 2, 3]]

    def test_one_block_would_have_chosen_the_same(self, run, run_blocks):
        kernel = ot_kernel(random(1, 48, 60), gamma=1.0)
        alone = run(greedy.greedy_select, kernel, 20)
        assert torch.equal(run_blocks(greedy.select_in_shape, kernel, 20, self.SHAPE, 1), alone)


class TestShape:
    @pytest.mark.parametrize("kernel", [greedy, facility], ids=["greedy", "facility"])
    @pytest.mark.parametrize("n", [1, 33, 576, 1024, 1025, 2340, 2880, 20000])
    def test_every_token_has_a_place_and_waiting_blocks_run_together(self, n, kernel):
        shape = kernel.shape_for(n, multiprocessors=132)
        assert shape.blocks * shape.columns >= n > (shape.blocks - 1) * shape.columns
        assert all(size & (size - 1) == 0 for size in (shape.columns, shape.rows, shape.warps))
        assert shape.blocks <= 132
        # One thread reads one block's bid.
        assert shape.blocks <= 32 * shape.warps

    def test_a_small_image_has_one_block_and_a_large_one_shares_the_gpu(self):
        assert [greedy.shape_for(n, 132).blocks for n in (576, 1024, 2880)] == [1, 1, 23]
        assert [facility.shape_for(n, 132).blocks for n in (100, 576, 2880)] == [1, 5, 23]


class TestMaxMin:
    @pytest.mark.parametrize(("batch", "n", "k"), [(1, 1, 1), (1, 2, 2), (3, 20, 20), (2, 70, 30)], ids=str)
    def test_it_takes_the_tokens_of_the_plain_version(self, run, batch, n, k):
        distance = random(batch, n, n)  # of any sign: nothing is computed with it
        distance = distance + distance.mT
        expected = max_min_select(distance.double(), k)
        assert torch.equal(run(max_min.max_min_select, distance, k), expected)

    def test_ties_go_to_the_lowest_index(self, run):
        distance = 1 - groups([2, 3, 1, 2])[None]
        distance[0, 5, :5] = distance[0, :5, 5] = -0.0
        expected = max_min_select(distance.double(), 8)
        assert torch.equal(run(max_min.max_min_select, distance, 8), expected)

    def test_the_diagonal_is_not_read(self, run):
        distance = random(1, 30, 30).abs()
        expected = run(max_min.max_min_select, distance + distance.mT, 30)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.nan)
        assert torch.equal(run(max_min.max_min_select, distance + distance.mT, 30), expected)


@pytest.mark.parametrize("options", ["weights", "served", "neither"])
class TestFacility:
    """float32 similarities of few digits: every sum is exact, so that ties are ties."""

    @staticmethod
    def task(batch: int, n: int, options: str) -> tuple:
        digits = (random(batch, n, n) * 8).round()
        weight = (random(batch, n, seed=1).abs() * 4).round() if options == "weights" else None
        served = (random(batch, n, seed=2) * 4).round() if options == "served" else None
        return digits + digits.mT, weight, served

    @pytest.mark.parametrize(("batch", "n", "k"), [(1, 1, 1), (1, 2, 2), (3, 20, 20), (2, 70, 30)], ids=str)
    def test_it_takes_the_tokens_of_the_plain_version(self, run, batch, n, k, options):
        similarity, weight, served = self.task(batch, n, options)
        expected = facility_select(similarity.double(), k, weight, served)
        assert torch.equal(run(facility.facility_select, similarity, k, weight, served), expected)

    def test_over_several_blocks(self, run_blocks, options):
        similarity, weight, served = self.task(3, 45, options)
        expected = facility_select(similarity.double(), 12, weight, served)
        shape = greedy.Shape(blocks=3, columns=16, rows=4, warps=4)
        order = run_blocks(facility.select_in_shape, similarity, 12, weight, served, shape, 2)
        assert torch.equal(order, expected)


def tokens_of_all_sizes(batch: int, n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens whose columns and rows differ in size by a million."""
    x = random(batch, n, d)
    return (x * torch.logspace(-3, 0, d) * torch.logspace(-3, 0, n)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "n", "d"), [(1, 1, 1), (2, 40, 70), (1, 128, 32), (1, 150, 33)], ids=str)
class TestProducts:
    """Two parts of 11 bits each: as exact as float32's own product."""

    @pytest.mark.parametrize("gamma", [0.01, 4.5])
    def test_the_kernel_is_the_plain_one(self, run, batch, n, d, dtype, gamma):
        x = tokens_of_all_sizes(batch, n, d, dtype)
        unit = x.double() / x.double().norm(dim=1, keepdim=True)
        similarity = unit @ unit.mT
        expected = torch.eye(n).double() + gamma * similarity @ similarity.mT
        found = run(symmetric.ot_kernel, x, gamma)
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < PRECISION
        torch.testing.assert_close(found, ot_kernel(x, gamma), rtol=1e-5, atol=1e-6 * float(found.max()))

    def test_cosines_are_the_plain_ones(self, run, batch, n, d, dtype):
        x = tokens_of_all_sizes(batch, n, d, dtype)
        x[0, 0] = 0
        unit = torch.nn.functional.normalize(x.double(), dim=-1)
        found = run(symmetric.cosine_similarity, x)
        assert relative_error(found, unit @ unit.mT) < PRECISION
        torch.testing.assert_close(found, cosine_similarity(x), rtol=1e-5, atol=1e-6)
        assert not found[0, 0].any()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


class TestProductsAtTheEdge:
    def test_a_column_too_small_to_be_normalised_fades(self, run):
        x = random(1, 30, 8)
        x[..., 3] = 1e-30
        torch.testing.assert_close(run(symmetric.ot_kernel, x, 0.01), ot_kernel(x))

    def test_one_token_that_is_all_there_is(self, run):
        # Its similarity with itself is D, the largest value there is.
        x = torch.zeros(1, 20, 300)
        x[0, 7] = 1
        found = run(symmetric.ot_kernel, x, 0.01)[0]
        assert found[7, 7] == 1 + 0.01 * 300**2 and found.sum() == 20 + 0.01 * 300**2

    def test_a_value_that_is_not_a_number_reaches_all_it_touches(self, run):
        x = random(1, 20, 6)
        x[0, 4, 2] = torch.nan
        assert run(symmetric.ot_kernel, x, 0.01).isnan().all()
        assert torch.equal(run(symmetric.cosine_similarity, x).isnan(), cosine_similarity(x).isnan())

    def test_tokens_may_lie_in_any_order(self, run):
        x = random(2, 12, 40)
        turned = x.mT.contiguous().mT
        assert torch.equal(run(symmetric.ot_kernel, turned, 0.01), run(symmetric.ot_kernel, x, 0.01))

    @pytest.mark.parametrize("tiling", symmetric.TILINGS, ids=str)
    def test_every_tiling_gives_the_whole_product(self, run, tiling):
        x = random(2, 150, 40)
        found = run(ot_kernel_in, tiling, x, 0.01)
        torch.testing.assert_close(found, ot_kernel(x))
        # Mirrored tiles are equal; within a tile on the diagonal the order of the sums differs.
        torch.testing.assert_close(found, found.mT, rtol=1e-6, atol=1e-7)

    def test_the_largest_tiles_with_which_an_image_fills_the_gpu_are_taken(self):
        assert [symmetric.tiling_for(n, 132).side for n in (576, 1152, 2880)] == [32, 64, 128]


LIMITS = {80: 163, 90: 227, 100: 227, 120: 99}
"""Compute capability -> KiB of shared memory that a block may have."""


@pytest.mark.parametrize("capability", LIMITS)
class TestMachineCode:
    """The kernels are compiled as they are launched, for GPUs that are not here."""

    @pytest.fixture(autouse=True)
    def many_multiprocessors(self, monkeypatch):
        monkeypatch.setattr(kernels, "multiprocessors", lambda device: 132)

    @pytest.mark.parametrize(
        ("batch", "n", "dtype"),
        [(1, 576, torch.float16), (8, 576, torch.bfloat16), (3, 2341, torch.float32)],
        ids=str,
    )
    def test_every_launch_compiles_and_has_room(self, capability, batch, n, dtype):
        x = torch.ones(batch, n, 64, dtype=dtype)
        with compiled_for(capability) as compiled:
            kernel = symmetric.ot_kernel(x, 0.01)
            greedy.greedy_select(kernel, 5)
            max_min.max_min_select(symmetric.cosine_similarity(x), 5)
            facility.facility_select(kernel, 5, kernel[:, 0], None)
        assert [one.metadata.name for one in compiled] == [
            *("_normalise", "_multiply", "_multiply", "_greedy"),
            *("_normalise", "_multiply", "_max_min", "_facility"),
        ]
        assert max(one.metadata.shared for one in compiled) <= 2**10 * LIMITS[capability]
        # Blocks that wait for each other are launched to run at the same time.
        assert [one.metadata.launch_cooperative_grid for one in compiled] == [
            one.metadata.name == "_facility" or (one.metadata.name == "_greedy" and n > 1024) for one in compiled
        ]

    @pytest.mark.parametrize(("n", "dtype"), [(576, torch.float16), (2341, torch.float32)], ids=str)
    def test_an_image_meets_the_same_machine_code_and_numbers_in_every_batch(self, capability, n, dtype):
        def met(batch: int) -> set:
            x = torch.ones(batch, n, 64, dtype=dtype)
            with compiled_for(capability) as compiled:
                kernel = symmetric.ot_kernel(x, 0.01)
                greedy.greedy_select(kernel, 5)
                facility.facility_select(kernel, 5, None, None)
                max_min.max_min_select(symmetric.cosine_similarity(x), 5)
            blocks = {
                # The images are the last axis, or there is one.
                (name, grid[:-1], *((key, value) for key, value in numbers.items() if key != "first"))
                for name, grid, numbers in compiled.launches
            }
            return blocks | {one.hash for one in compiled}

        assert met(1) == met(8) == met(33)

    def test_images_of_many_sizes_share_their_kernels(self, capability):
        with compiled_for(capability) as compiled:
            for n in (1040, 1499, 1500, 2144, 2341, 2880):  # blocks an image: 9 to 23
                greedy.greedy_select(symmetric.ot_kernel(torch.ones(1, n, 32), 0.01), 40)
        # What 16 divides has wider loads; two tilings, S and the kernel.
        for name, most in {"_greedy": 2, "_normalise": 2, "_multiply": 2 * 2 * 2}.items():
            assert len({one.hash for one in compiled if one.metadata.name == name}) <= most

    @pytest.mark.parametrize("count", [1, 132], ids=["one block", "several blocks"])
    def test_the_greedies_keep_their_numbers_in_registers(self, capability, count, tmp_path, monkeypatch):
        monkeypatch.setattr(kernels, "multiprocessors", lambda device: count)
        with compiled_for(capability) as compiled:
            for n in (576, 2880):
                greedy.greedy_select(torch.ones(1, n, n), 5)
                facility.facility_select(torch.ones(1, n, n), 5, None, None)
        assert max(bytes_spilled(one, tmp_path) for one in compiled) <= 16


def on_the_gpu(name: str, *arguments):
    """`kernels.fused`, wherever the tensors say that they lie."""
    return getattr(FUSED[name], name)(*arguments) if name in FUSED else None


class TestAKernelThatCannotBeLaunched:
    @pytest.fixture
    def gpu(self, monkeypatch):
        with pretended_gpu():
            monkeypatch.setattr(kernels, "_triton_serves", lambda device: True)
            monkeypatch.setattr(kernels, "_UNUSABLE", set())
            yield lambda error: [monkeypatch.setattr(module, name, raising(error)) for name, module in FUSED.items()]
            monkeypatch.undo()

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch"),
            PermissionError("[Errno 13] Permission denied: '/.triton'"),
            subprocess.CalledProcessError(255, "ptxas"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_warns_once_and_the_plain_version_serves(self, gpu, error):
        gpu(error)
        x = random(2, 40, 16)
        expected = [select(x, k=9, method=method) for method in ("otprune", "divprune")]
        with pytest.warns(UserWarning, match=type(error).__name__) as said:
            for _ in range(2):
                found = [select(x.to(GPU), k=9, method=method).cpu() for method in ("otprune", "divprune")]
        assert [str(one.message).split()[0] for one in said] == [
            *("ot_kernel", "greedy_select", "cosine_similarity", "max_min_select")
        ]
        assert all(map(torch.equal, found, expected))

    def test_for_want_of_memory_says_so(self, gpu):
        gpu(torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(torch.OutOfMemoryError):
            select(random(2, 40, 16).to(GPU), k=9)


def raising(error: Exception):
    def function(*arguments):
        raise error

    return function


@pytest.mark.parametrize("name", ["otprune", "divprune", "dpp", "cdpruner"])
def test_three_matrices_an_image_are_all_that_is_held(name, monkeypatch):
    """What is allocated for the launches, of which none is made."""
    for module in (llava_arch, divprune, similarity):
        monkeypatch.setattr(module, "fused", on_the_gpu)
    options = {"relevance": "embeddings"} if name == "cdpruner" else {}
    n, tokens = 1200, torch.ones(2, 1200, 32)
    asked = VisualTokens(tokens, 40, question=tuple(torch.ones(2, 3, 32)))
    with compiled_for(90) as compiled, LiveBytes() as live:
        method_class(name)(**options).select(asked)
    assert len(compiled) >= 3
    matrix = len(tokens) * n * n * 4
    assert matrix < live.peak < 3.2 * matrix


@needs_gpu
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("batch", "n", "k"), [(1, 576, 56), (32, 576, 56), (1, 2880, 282), (7, 2340, 100)], ids=str
    )
    def test_real_sizes_choose_as_the_plain_version_in_float64(self, batch, n, k, dtype):
        x = random(batch, n, 1024).to(dtype).cuda()
        for kernel, order in zip(ot_kernel(x)[:2], ot_select(x, k)[:2], strict=True):
            assert_is_greedy(kernel, order)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("batch", "n"), [(8, 1), (8, 100), (1, 576), (8, 576), (32, 576), (1, 2880)], ids=str)
    def test_products_are_the_plain_ones_in_float64(self, batch, n, dtype):
        x = random(batch, n, 1000).to(dtype).cuda()
        unit = x.double() / x.double().norm(dim=1, keepdim=True)
        similarity = unit @ unit.mT
        expected = torch.eye(n, device="cuda").double() + 0.01 * similarity @ similarity.mT
        assert relative_error(symmetric.ot_kernel(x, 0.01), expected) < PRECISION
        unit = torch.nn.functional.normalize(x.double(), dim=-1)
        assert relative_error(symmetric.cosine_similarity(x), unit @ unit.mT) < PRECISION

    @pytest.mark.parametrize("batch", [8, 32])
    @pytest.mark.parametrize("n", [576, 2341])
    def test_an_image_is_the_same_in_every_batch_to_the_last_bit(self, n, batch):
        x = random(batch, n, 256).half().cuda()
        together = ot_kernel(x)
        chosen = {method: select(x, k=n // 10, method=method) for method in ("otprune", "divprune", "dpp")}
        for image in (0, batch - 1):
            assert torch.equal(ot_kernel(x[image]), together[image])
            for method, kept in chosen.items():
                assert torch.equal(select(x[image], k=n // 10, method=method), kept[image])

    @pytest.mark.parametrize("method", ["otprune", "divprune", "dpp"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_the_choice_is_that_of_a_cpu(self, method, dtype):
        x = random(2, 576, 256).to(dtype)
        found, expected = select(x.cuda(), k=56, method=method).cpu(), select(x, k=56, method=method)
        shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
        assert min(shared) >= 55  # near-ties

    @pytest.mark.parametrize("n", [576, 2880])
    def test_the_host_waits_for_nothing(self, n):
        x = random(1, n, 64).cuda()

        def choose():
            return ot_select(x, n // 10), max_min_select(torch.cdist(x, x), n // 10)

        choose()
        torch.cuda.set_sync_debug_mode("error")
        try:
            choose()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("n", [576, 2880])
    def test_launches_do_not_depend_on_the_budget(self, n):
        kernel = ot_kernel(random(1, n, 64).cuda())
        assert count_launches(lambda: greedy_select(kernel, 4)) == count_launches(lambda: greedy_select(kernel, n // 4))


def count_launches(function) -> int:
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)
