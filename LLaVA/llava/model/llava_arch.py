"""OTPrune, and LLaVA's way from images and text to what the language model reads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llava.model.active_pruner import ActivePruner, accepted, fitted
from llava.model.image_tokens import check_images, image_tokens, project, tokens_in_prompts
from llava.model.image_tokens import unpad_image as unpad_image
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.prefill import Prefill, PreparedInputs, latest
from llava.model.prompt import build_prompts, embed, find_marks, rotary_positions
from llava.pruning.base import Pruner
from llava.pruning.config import PruningConfig
from llava.pruning.kernels import EXHAUSTED, SMALLEST_NORM, fused, gram
from llava.pruning.reduce import reduce_images
from llava.pruning.tokens import ImageTokens, VisualTokens

Mixin: Any = object
"""What is mixed into a model of transformers sees its attributes, which no type checker knows."""

GAMMA = 0.01
GAMMA_WIDTH = 4096
"""Width of the visual tokens that the paper chose `GAMMA` for."""


def gamma_for_width(width: int) -> float:
    """The gamma that weighs like the paper's 0.01 at 4,096 for tokens of ``width`` numbers; never below 0.01.

    S is a sum over ``width`` normalised columns, so gamma S S^T grows with gamma * width^2.
    """
    return GAMMA * max(1.0, (GAMMA_WIDTH / width) ** 2)


def ot_kernel(features: torch.Tensor, gamma: float = GAMMA) -> torch.Tensor:
    """OTPrune's kernel ``K = I + gamma S S^T``.

    ``S = X~ X~^T``, where every feature column of X is divided by its Euclidean norm over the tokens (a column of
    zeros stays zero). ``log det K_C`` of a subset C is the relaxed, submodular form of "small 2-Wasserstein distance
    between the kept and the full token distribution".

    Parameters
    ----------
    features : Tensor (N, D) or (B, N, D), floating
        Visual tokens.
    gamma : float
        Weight of the similarity term, 0.01 in the paper.

    Returns
    -------
    Tensor (N, N) or (B, N, N), float32
        Symmetric, all eigenvalues at least 1.

    Source: OTPrune, arXiv 2602.20205.
    """
    if features.ndim == 2:
        return ot_kernel(features.unsqueeze(0), gamma)[0]
    kernel = fused("ot_kernel", features, gamma)
    if kernel is not None:
        return kernel
    with torch.autocast(features.device.type, enabled=False):
        x = features.float()
        norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True)  # (B, 1, D)
        x = x / norm.clamp_min(SMALLEST_NORM)
        similarity = gram(x)  # (B, N, N)
        kernel = gram(similarity).mul_(gamma)
        kernel.diagonal(dim1=-2, dim2=-1).add_(1)
        return kernel


def greedy_select(kernel: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy maximisation of ``log det K_C`` over subsets of size k, by incremental Cholesky.

    Each step takes the largest marginal gain ``d_j`` (its logarithm is what ``log det`` grows by), appends the Cholesky
    row ``e = (K_j - C_j^T C) / sqrt(d_j)`` and lowers every gain by ``e^2``. O(k^2 N), no host synchronisation.

    Parameters
    ----------
    kernel : Tensor (N, N) or (B, N, N), floating
        Symmetric positive semi-definite; half precision is read as float32.
    k : int
        How many to take, 1 <= k <= N.

    Returns
    -------
    Tensor (k,) or (B, k), int64
        Indices in greedy order; ties go to the lowest index.

    Raises
    ------
    ValueError
        If the kernel is not square or k out of range.

    Source: Chen, Zhang and Zhou, "Fast greedy MAP inference for determinantal point processes", NeurIPS 2018.
    """
    if kernel.ndim not in (2, 3) or kernel.shape[-1] != kernel.shape[-2]:
        raise ValueError(f"the kernel must be (N, N) or (B, N, N), not {tuple(kernel.shape)}")
    n = kernel.shape[-1]
    _check_budget(k, n)
    if kernel.ndim == 2:
        return greedy_select(kernel.unsqueeze(0), k)[0]

    kernel = kernel if kernel.dtype == torch.float64 else kernel.float()
    order = fused("greedy_select", kernel, k)
    if order is not None:
        return order
    batch = kernel.shape[0]
    rows = torch.arange(batch, device=kernel.device)
    gain = kernel.diagonal(dim1=-2, dim2=-1).clone()  # (B, N)
    exhausted = EXHAUSTED * gain.amax(dim=-1, keepdim=True)  # below this a gain is rounding error
    factor = kernel.new_zeros(batch, k, n)
    order = torch.empty(batch, k, dtype=torch.int64, device=kernel.device)
    for step in range(k):
        chosen = gain.argmax(dim=-1)  # (B,)
        order[:, step] = chosen
        if step == k - 1:
            break
        pivot = gain[rows, chosen].unsqueeze(-1)  # (B, 1)
        with torch.autocast(kernel.device.type, enabled=False):
            explained = torch.einsum("bs,bsn->bn", factor[rows, :step, chosen], factor[:, :step])
        row = (kernel[rows, chosen] - explained) / pivot.clamp_min(exhausted).sqrt()
        row = row.masked_fill(pivot <= exhausted, 0)
        factor[:, step] = row
        gain -= row.square()
        gain.scatter_(1, chosen.unsqueeze(-1), -math.inf)
    return order


def ot_select(features: torch.Tensor, k: int, gamma: float = GAMMA) -> torch.Tensor:
    """``greedy_select(ot_kernel(features, gamma), k)`` by the least work.

    A GPU has the whole kernel sooner than it could read S once a step. A CPU computes the rows that the greedy reads,
    about k of the N: ``K_j = e_j + gamma S S_j``. Tokens whose gains differ by no more than float32's rounding may come
    in another order than from the kernel.

    Features (N, D) or (B, N, D) -> (k,) or (B, k), int64, in greedy order; a `ValueError` if k is out of range.
    """
    _check_budget(k, features.shape[-2])
    if features.ndim == 2:
        return ot_select(features.unsqueeze(0), k, gamma)[0]
    order = fused("ot_select", features, k, gamma)
    return greedy_select(ot_kernel(features, gamma), k) if order is None else order


def _check_budget(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and N = {n}, not {k}")


@dataclass(frozen=True, kw_only=True)
class OTPrune(Pruner):
    """Keep the tokens whose distribution is closest, in optimal transport, to that of all tokens.

    Attributes
    ----------
    gamma : float or None
        Weight of the similarity term in `ot_kernel`, > 0. None is `gamma_for_width` of the tokens' width, and with
        ``compat`` the published 0.01.
    compat : bool
        Reproduce the published implementation token for token: Cholesky rows in the features' own precision, and the
        kept tokens handed on in the iteration order of a Python set instead of raster order.
    """

    source: ClassVar[str] = "OTPrune, arXiv 2602.20205"
    venue: ClassVar[str] = "CVPR"
    year: ClassVar[int] = 2026
    cost: ClassVar[str] = "O(N^2 D + N^3), greedy O(k^2 N)"

    gamma: float | None = None
    compat: bool = False

    def __post_init__(self):
        if self.gamma is not None and not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"OTPrune's gamma must be a finite number > 0, not {self.gamma}")

    @property
    def keeps_raster_order(self) -> bool:
        return not self.compat

    def for_width(self, width: int) -> OTPrune:
        if self.gamma is not None:
            return self
        return dataclasses.replace(self, gamma=GAMMA if self.compat else gamma_for_width(width))

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        gamma = self.for_width(tokens.features.shape[-1]).gamma
        assert gamma is not None  # for_width's
        if not self.compat:
            return ot_select(tokens.features, tokens.k, gamma)
        from llava.pruning.methods.otprune_published import published_order

        chosen = [list(set(published_order(image, tokens.k, gamma))) for image in tokens.features]
        return torch.tensor(chosen, dtype=torch.int64).to(tokens.features.device, non_blocking=True)


class LlavaMetaModel(Mixin):
    """Adds vision tower, projector and the anyres newline to a decoder-only language model.

    Parameters
    ----------
    config
        With ``mm_vision_tower`` it names a tower, which is then built.
    **tower_source
        Where that is looked for: ``folders`` and ``hub`` of `build_vision_tower`.
    """

    def __init__(self, config, **tower_source: Any):
        super().__init__(config)
        if hasattr(config, "mm_vision_tower"):
            self.vision_tower = build_vision_tower(config, delay_load=True, **tower_source)
            self.mm_projector = build_vision_projector(config)
            if "unpad" in getattr(config, "mm_patch_merge_type", ""):
                self.image_newline = nn.Parameter(torch.empty(config.hidden_size))

    def get_vision_tower(self):
        tower = getattr(self, "vision_tower", None)
        return tower[0] if isinstance(tower, list) else tower

    def initialize_vision_modules(self, model_args, fsdp=None) -> None:
        """See `llava.model.vision_modules`."""
        from llava.model.vision_modules import initialize_vision_modules

        initialize_vision_modules(self, model_args, fsdp)


class LlavaMetaForCausalLM(Mixin):
    """The multimodal half of a LLaVA model: images to visual tokens, pruning, and the splice into the text.

    A class that mixes this in provides ``get_model()``.

    Attributes
    ----------
    prompt_tokenizer
        Turns a prompt's ids back into text, for methods that read the question with another model; None if unknown.
    visual_cache : VisualCache or None
        With one, the vision tower sees an image once, whichever methods prune it, unless gradients are wanted.
    active_pruner : ActivePruner
        What prunes the model.
    latest_prefill : Prefill or None
        What is known of the prompts with images that came last, for whoever reports it.
    """

    prompt_tokenizer = None
    visual_cache = None
    active_pruner = ActivePruner()
    latest_prefill: Prefill | None = None
    visual_token_counts = latest("token_counts")
    visual_tokens_per_layer = latest("tokens_per_layer")
    visual_tokens_after_attention = latest("tokens_after_attention")

    @property
    def pruning(self) -> PruningConfig | None:
        """The active pruning configuration, None when nothing is pruned."""
        return self.active_pruner.config

    def set_pruning(self, config: PruningConfig | None) -> None:
        """Prune as ``config`` says from the next call on, if it is `accepted`; None switches pruning off."""
        self.active_pruner = ActivePruner() if config is None else accepted(self, config)

    def fit_pruning(self) -> None:
        """Let the active method learn from this model where to drop, if it has to; done at the first use otherwise."""
        if self.active_pruner.config is not None and not self.active_pruner.schedule:
            self.active_pruner = fitted(self, self.active_pruner)

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) -> projected visual tokens (B, N, D), in the projector's dtype."""
        return project(self.get_model().mm_projector, self.get_vision_tower()(images))

    def image_tokens(self, images, image_sizes=None) -> list[ImageTokens]:
        """Every image's visual tokens, with what the active method asks of them; see `image_tokens`."""
        return image_tokens(self, images, image_sizes, self.active_pruner.pruner)

    def visual_tokens(self, images, image_sizes=None) -> list[torch.Tensor]:
        """Every image's visual tokens (N_i, D), as an unpruned model would see them; see `image_tokens`."""
        return [image.features for image in self.image_tokens(images, image_sizes)]

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """Replace every image mark of the prompts by that image's (kept) visual tokens.

        Parameters
        ----------
        input_ids : Tensor (B, T), int64
            Text, with `IMAGE_TOKEN_INDEX` where an image stands. Rows take images in order; a row without a mark takes
            one and does not use it.
        position_ids, attention_mask, labels : Tensor (B, T), or None
        past_key_values
            Handed through; positions go on from what it holds.
        images, image_sizes
            See `image_tokens`.

        Returns
        -------
        PreparedInputs
            (None, position_ids, attention_mask, past_key_values, inputs_embeds (B, T', D), labels), each None where
            None came in (but position_ids and attention_mask where pruning leaves gaps in the positions); the
            arguments unchanged, with inputs_embeds None, when there is nothing to splice (no tower, no images, or a
            decoding step).

        Raises
        ------
        IndexError
            If the prompts ask for more images than there are.
        ValueError
            If several prompts ask for fewer, or the images are not what `image_tokens` takes.
        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        config, device, embed_tokens = self.config, input_ids.device, self.get_model().embed_tokens
        if getattr(config, "tune_mm_mlp_adapter", False) and getattr(config, "mm_use_im_start_end", False):
            raise NotImplementedError("tune_mm_mlp_adapter together with mm_use_im_start_end is not supported")
        image_sizes = image_sizes if check_images(images, image_sizes) else None
        self.fit_pruning()
        active = self.active_pruner

        rows, images_of_rows = find_marks(input_ids, attention_mask, labels, len(images))
        tokens = tokens_in_prompts(self, images, image_sizes, rows, images_of_rows)
        pruner, fraction = (active.pruner, active.schedule[0][1]) if active.before_decoder else (None, 1.0)
        kept = reduce_images(pruner, tokens, fraction)
        prompts = build_prompts(rows, tokens, kept, config)
        embeds = embed(prompts, kept, lambda ids: embed_tokens(ids.to(device, non_blocking=True)))

        # A plain copy to a GPU waits until the GPU is idle.
        mask = prompts.mask.to(device, non_blocking=True)
        asked = position_ids is not None
        positions = rotary_positions(prompts, kept, mask, asked, active.leaves_gaps, past_key_values)
        # Without a mask, gaps in the positions would be read as borders between packed sequences.
        unasked = mask if active.leaves_gaps else None
        attention_mask = unasked if attention_mask is None else mask.to(attention_mask.dtype)
        labels = None if labels is None else prompts.labels.to(device, non_blocking=True)
        self.latest_prefill = Prefill.of(active, tokens, kept, prompts, mask, config.num_hidden_layers)
        values = (None, positions, attention_mask, past_key_values, embeds, labels)
        return PreparedInputs(values, self.latest_prefill)

    def initialize_vision_tokenizer(self, model_args, tokenizer) -> None:
        """See `llava.model.vision_modules`."""
        from llava.model.vision_modules import initialize_vision_tokenizer

        initialize_vision_tokenizer(self, model_args, tokenizer)
