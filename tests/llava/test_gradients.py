"""Training under pruning: what is kept or merged has its gradient, and only the choice has none."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llava.constants import IGNORE_INDEX
from llava.pruning import available_methods, pruning
from llava.pruning.registry import method_class
from tiny_llava import pad_rows, pixels, prompt
from tiny_methods import OPTIONS, RATIOS
from tiny_trained import trained_networks

LAYERED = [
    (name, layer)
    for name in sorted(available_methods())
    for layer in ([None] if name in RATIOS else [L for L in (0, 2) if method_class(name)().first_layer <= L])
]
CASES = [(name, layer, False) for name, layer in LAYERED]
CASES += [(name, layer, True) for name, layer in LAYERED if name in ("otprune", "downsample", "visionzip", "sparsevlm")]
STEP = 1e-6
"""So small that no other token is chosen."""


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return OPTIONS | trained_networks(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def batch():
    """Two rows, one of them with two images, whose last four tokens are predicted."""
    ids, mask = pad_rows([prompt(3, 9, seed=1), prompt(4, 5, 8, seed=2)])
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, length in enumerate(mask.sum(dim=1)):
        labels[row, length - 4 : length] = ids[row, length - 4 : length]
    images = [pixels(crops, seed=3).double() for crops in (5, 3, 3)]
    sizes = [(112, 90), (56, 112), (112, 50)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": images, "image_sizes": sizes}


@pytest.fixture
def norms_in_float64(monkeypatch):
    """Norms that do not round to float32, as those of transformers do."""

    def forward(self, hidden):
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize(("method", "layer", "per_crop"), CASES, ids=str)
def test_autograd_agrees_with_finite_differences(anyres, batch, options, method, layer, per_crop):
    """Along one random direction of the projector's weights, all of whose effects pass through the pruner."""
    anyres.double()
    weight = anyres.get_model().mm_projector[0].weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)).double()

    def value(step: float = 0.0) -> torch.Tensor:
        weight.data += step * direction
        # The loss itself is float32.
        found = anyres(**batch, use_cache=False).logits.log_softmax(dim=-1)[..., 7].mean()
        weight.data -= step * direction
        return found

    settings = options.get(method, {}) | {"per_crop": per_crop}
    with pruning(anyres, method, ratio=RATIOS.get(method, 0.3), layer=layer, **settings):
        (gradient,) = torch.autograd.grad(value(), weight)
        with torch.no_grad():
            expected = (value(STEP) - value(-STEP)) / (2 * STEP)
    assert expected.abs() > 1e-3
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-4, atol=1e-6)
