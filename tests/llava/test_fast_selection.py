"""The fast selections on a CPU: the choices of the plain versions, from less work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from golden import golden_root
from golden_features import load_features
from live_bytes import LiveBytes
from llava.model import llava_arch
from llava.model.llava_arch import greedy_select, ot_kernel, ot_select
from llava.pruning import similarity
from llava.pruning.kernels import fast_version, gram, host
from llava.pruning.methods.divprune import max_min_select
from llava.pruning.similarity import cosine_similarity
from no_waiting import no_waiting
from selections import assert_is_greedy

ROOT = golden_root() / "pruning"
META = json.loads((ROOT / "selection_meta.json").read_text())["otprune"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_kernel(features: torch.Tensor, gamma: float = 0.01) -> torch.Tensor:
    """OTPrune's kernel in float64: (N, D) -> (N, N)."""
    x = features.double()
    x = x / torch.linalg.vector_norm(x, dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    similarity = x @ x.T
    return torch.eye(len(x), dtype=torch.float64) + gamma * similarity @ similarity.T


class TestOTPrune:
    @pytest.mark.parametrize("key", [key for key in META if key.endswith("/float32")])
    def test_the_order_is_the_published_one_up_to_the_first_near_tie(self, key):
        features = load_features(ROOT, key.rsplit("/", 1)[0])
        stable = max(1, META[key]["stable_prefix_1e-5"])
        expected = np.load(ROOT / "otprune_selection.npz")[f"{key}/order_full"]
        assert ot_select(features, stable).tolist() == expected[:stable].tolist()

    # D at both sides of N / 3, where the cheaper factorisation changes
    @pytest.mark.parametrize("d", [1, 5, 39, 40, 41, 200])
    @pytest.mark.parametrize("k", [1, 2, 60, 119, 120])
    def test_every_step_takes_the_largest_gain(self, d, k):
        features = random(120, d)
        assert_is_greedy(exact_kernel(features, gamma=1.0), ot_select(features, k, gamma=1.0))

    @pytest.mark.parametrize("content", ["duplicates", "zeros", "a column of zeros", "one token", "huge", "tiny"])
    def test_pictures_without_content(self, content):
        features = random(90, 12)
        if content == "duplicates":
            features[45:] = features[:45]
        elif content == "zeros":
            features[:] = 0
        elif content == "a column of zeros":
            features[:, 4] = 0
        elif content == "one token":
            features[:] = features[:1].clone()
        else:
            features *= {"huge": 1e18, "tiny": 1e-18}[content]
        order = ot_select(features, 60)
        assert_is_greedy(exact_kernel(features), order)
        if content in ("zeros", "one token"):
            assert order.tolist() == list(range(60))

    def test_a_batch_is_its_images(self):
        features = random(3, 80, 100)
        orders = ot_select(features, 20)
        assert orders.shape == (3, 20) and orders.dtype == torch.int64
        assert [order.tolist() for order in orders] == [ot_select(image, 20).tolist() for image in features]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_other_dtypes_are_read_as_float32(self, dtype):
        features = random(70, 90).to(dtype)
        assert ot_select(features, 20).tolist() == ot_select(features.float(), 20).tolist()

    def test_views_are_read_as_they_are_meant(self):
        features = random(90, 140).T[::2]
        before = features.clone()
        assert ot_select(features, 9).tolist() == ot_select(before.contiguous(), 9).tolist()
        assert torch.equal(features, before)

    def test_no_more_than_three_matrices_of_all_pairs_are_held(self):
        features = random(600, 16)
        with LiveBytes() as memory:
            ot_select(features, 60)
        assert 600 * 600 * 4 < memory.peak < 3 * 600 * 600 * 4

    @pytest.mark.parametrize("k", [0, -3, 71])
    def test_a_budget_outside_the_image_is_refused(self, k):
        with pytest.raises(ValueError, match=f"between 1 and N = 70, not {k}"):
            ot_select(random(70, 8), k)


class TestGreedy:
    @pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (2, 3, 2), (50, 80, 50), (200, 30, 90)], ids=str)
    def test_it_chooses_as_the_plain_version(self, n, d, k, monkeypatch):
        kernels = ot_kernel(random(2, n, d), gamma=1.0)
        fast = greedy_select(kernels, k)
        monkeypatch.setattr(llava_arch, "fused", lambda name, *arguments: None)
        assert torch.equal(greedy_select(kernels, k), fast)
        for kernel, order in zip(kernels, fast, strict=True):
            assert_is_greedy(kernel, order)

    def test_ties_go_to_the_lowest_index(self):
        diagonal = torch.tensor([1.0, 3, 2, 3, 0, 1, 3, -0.0, 0, 2] * 10)
        expected = diagonal.argsort(descending=True, stable=True)
        assert greedy_select(torch.diag(diagonal), 100).tolist() == expected.tolist()

    def test_what_duplicates_leave_is_taken_in_order(self):
        kernel = torch.block_diag(torch.ones(3, 3), torch.ones(1, 1), torch.ones(4, 4))
        assert greedy_select(kernel, 8).tolist() == [0, 3, 4, 1, 2, 5, 6, 7]

    def test_a_row_is_computed_once_and_only_where_it_may_be_read(self):
        kernel = ot_kernel(random(600, 900))
        asked = []

        def rows(tokens):
            asked.extend(tokens.tolist())
            return kernel[tokens]

        order = host.greedy_order(kernel.diagonal().numpy().copy(), rows, 50)
        assert len(set(asked)) == len(asked) < 200
        assert set(order[:-1]) <= set(asked)


class TestMaxMin:
    @pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (64, 64), (65, 20), (300, 40)], ids=str)
    def test_it_takes_the_tokens_of_the_plain_version(self, n, k):
        distance = random(2, n, n)
        distance = distance + distance.mT
        assert torch.equal(max_min_select(distance, k), max_min_select(distance.double(), k))

    def test_the_diagonal_is_not_read(self):
        distance = random(1, 100, 100)
        distance = distance + distance.mT
        expected = max_min_select(distance, 100)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.nan)
        before = distance.clone()
        assert torch.equal(max_min_select(distance, 100), expected)
        torch.testing.assert_close(distance, before, rtol=0, atol=0, equal_nan=True)


class TestGram:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("view", [lambda x: x, lambda x: x.mT, lambda x: x[:, ::3]], ids=["plain", "mT", "strided"])
    def test_it_is_the_product_with_the_transpose(self, view, dtype):
        x = view(random(3, 40 + host.STRIP, 40).to(dtype))
        found = gram(x)
        assert found.dtype == dtype
        # some units in the last place of a sum of up to 136 terms
        torch.testing.assert_close(found, x @ x.mT, rtol=10 * torch.finfo(dtype).eps, atol=100 * torch.finfo(dtype).eps)


class TestCosine:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("view", [lambda x: x, lambda x: x.mT, lambda x: x[:, ::3]], ids=["plain", "mT", "strided"])
    def test_it_is_the_plain_one(self, view, dtype, monkeypatch):
        x = view(random(3, 30, 40).to(dtype)).clone(memory_format=torch.preserve_format)
        x[1, 4] = 0
        x[2, 3] *= 1e-3
        before = x.clone()
        found = cosine_similarity(x)
        assert torch.equal(x, before) and found.dtype == torch.float32
        assert torch.equal(found, gram(torch.nn.functional.normalize(x.float().contiguous(), dim=-1)))
        monkeypatch.setattr(similarity, "fused", lambda name, *arguments: None)
        torch.testing.assert_close(found, cosine_similarity(x), rtol=1e-5, atol=1e-6)
        assert not found[1, 4].any()

    def test_it_is_float32_whatever_the_default_is(self):
        x = random(1, 9, 5)
        expected, usual = cosine_similarity(x), torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        try:
            assert torch.equal(cosine_similarity(x), expected)
        finally:
            torch.set_default_dtype(usual)

    def test_what_is_not_finite_touches_its_own_token_alone(self):
        x = random(1, 9, 5)
        x[0, 2, 1] = torch.nan
        touched = cosine_similarity(x)[0].isnan()
        assert touched[2].all() and touched[:, 2].all() and touched.sum() == 9 + 8


class TestPlainVersion:
    """What a GPU without Triton runs; float64 gets it everywhere."""

    def test_no_step_makes_a_gpus_host_wait(self):
        features = random(2, 20, 8).double()
        assert no_waiting(greedy_select, ot_kernel(features).double(), 6).shape == (2, 6)
        assert no_waiting(max_min_select, torch.cdist(features, features), 6).shape == (2, 6)


class TestWhereItRuns:
    def test_gradients_flow_through_the_kernel(self):
        features = random(6, 4).requires_grad_()
        ot_kernel(features).sum().backward()
        assert features.grad.abs().sum() > 0

    def test_double_precision_and_unknown_devices_stay_with_the_plain_version(self):
        assert fast_version("greedy_select", random(1, 3, 3).double()) is None
        assert fast_version("greedy_select", torch.empty(1, 3, 3, device="meta")) is None
        assert fast_version("greedy_select", random(1, 3, 3)) is host.greedy_select

    def test_a_machine_without_triton_selects(self):
        code = (
            "import sys; sys.modules['triton'] = None\n"
            "import torch; from llava.pruning import select\n"
            "print(*(select(torch.eye(6), k=2, method=name).tolist() for name in ('otprune', 'divprune', 'dpp')))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[0, 1] [0, 1] [0, 1]"

    def test_no_threads_but_pytorchs_compute(self):
        code = (
            "import time, torch; from llava.pruning import select\n"
            "def seconds_of_other_threads(): return time.process_time() - time.thread_time()\n"
            "def run(n, k):\n"
            "    for name in ('otprune', 'divprune', 'dpp'): select(torch.randn(n, 400), k=k, method=name)\n"
            "run(2, 1)  # imports\n"
            "begin = seconds_of_other_threads(); run(600, 60); print(seconds_of_other_threads() - begin)"
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "2"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        # 0, up to what two readings of the clock differ by; a product on NumPy's threads takes milliseconds.
        assert float(done.stdout) < 1e-3
