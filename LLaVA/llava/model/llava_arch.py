"""OTPrune, and how visual tokens reach the language model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.model.checkpoint import read_tensors
from llava.model.language_model.kv_cache import Filling
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.observations import EncoderObserver, Output, encoder_outputs
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.offload import execution_device, parameter_here
from llava.model.splice import assign_images, embed, lay_out, original_positions, stack
from llava.model.visual_cache import FEATURES, Span, VisualCache
from llava.model.visual_sequence import (
    ImageTokens,
    PromptFacts,
    check_images,
    crop_grid,
    layout_of,
    merge_crops,
    reduce_images,
)
from llava.model.visual_sequence import unpad_image as unpad_image
from llava.pruning.base import INSIDE, Pruner, VisualTokens, content_key, kept_count
from llava.pruning.config import PruningConfig
from llava.pruning.kernels import EXHAUSTED, SMALLEST_NORM, fused, gram
from llava.pruning.schedule import kept_after_attention, kept_per_layer

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

    Parameters
    ----------
    features : Tensor (N, D) or (B, N, D), floating
        Visual tokens.
    k : int
        How many to take, 1 <= k <= N.
    gamma : float
        Weight of the similarity term.

    Returns
    -------
    Tensor (k,) or (B, k), int64
        Indices in greedy order; ties go to the lowest index.

    Raises
    ------
    ValueError
        If k is out of range.
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

    source: ClassVar[str] = "OTPrune, arXiv 2602.20205 (CVPR 2026)"

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
        if not self.compat:
            return ot_select(tokens.features, tokens.k, gamma)
        chosen = [list(set(_published_order(image, tokens.k, gamma))) for image in tokens.features]
        return torch.tensor(chosen, dtype=torch.int64).to(tokens.features.device, non_blocking=True)


def _published_order(features: torch.Tensor, k: int, gamma: float) -> list[int]:
    """Greedy order of the published OTPrune code for one image (N, D), rounding and restarts included."""
    norm = torch.linalg.vector_norm(features, dim=-2, keepdim=True)
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    x = features.to(wide) / norm.to(wide)
    similarity = x @ x.T
    kernel = torch.eye(len(x), dtype=wide, device=x.device) + (gamma * similarity) @ similarity.T
    order: list[int] = []
    while len(set(order)) < k:
        found = _published_greedy(kernel, k - len(set(order)), features.dtype)
        order += found
        # What was found is blanked out of the kernel and the rest is started again from nothing.
        kernel[found, :] = 0
        kernel[:, found] = 0
    return list(dict.fromkeys(order))


def _published_greedy(kernel: torch.Tensor, k: int, rows_dtype: torch.dtype) -> list[int]:
    gain = kernel.diagonal().clone()
    factor = torch.zeros(k, len(gain), dtype=rows_dtype, device=kernel.device)
    chosen = int(gain.argmax())
    order = [chosen]
    for step in range(k - 1):
        explained = factor[:step, chosen] @ factor[:step]
        row = (kernel[chosen] - explained) / gain[chosen].sqrt()
        factor[step] = row
        gain = gain - row.square()
        chosen = int(gain.argmax())
        if gain[chosen] < 1e-100:
            break
        order.append(chosen)
    return order


class LlavaMetaModel:
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
        """Give a plain language model its vision modules, before training.

        ``model_args`` carries vision_tower, mm_vision_select_layer, mm_vision_select_feature, mm_patch_merge_type,
        pretrain_mm_mlp_adapter (a file of projector weights, or None) and mm_projector_type. With ``fsdp`` the tower
        is kept in a list, out of the sight of the wrapper.
        """
        config = self.config
        config.mm_vision_tower = model_args.vision_tower
        tower = self.get_vision_tower()
        if tower is None:
            tower = build_vision_tower(model_args)
            self.vision_tower = [tower] if fsdp else tower
        else:
            tower.load_model()
        config.use_mm_proj = True
        config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
        config.mm_hidden_size = tower.hidden_size
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        config.mm_patch_merge_type = getattr(model_args, "mm_patch_merge_type", "flat")
        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = build_vision_projector(config)
            if "unpad" in config.mm_patch_merge_type:
                scale = config.hidden_size**-0.5
                self.image_newline = nn.Parameter(torch.randn(config.hidden_size, dtype=self.dtype) * scale)
        self.mm_projector.requires_grad_(True)
        if getattr(model_args, "pretrain_mm_mlp_adapter", None):
            weights = read_tensors(Path(model_args.pretrain_mm_mlp_adapter))
            prefix = "mm_projector."
            self.mm_projector.load_state_dict(
                {key.split(prefix)[1]: value for key, value in weights.items() if prefix in key}
            )


class LlavaMetaForCausalLM:
    """The multimodal half of a LLaVA model: images to visual tokens, pruning, and the splice into the text.

    A class that mixes this in provides ``get_model()``.

    Attributes
    ----------
    prompt_tokenizer
        Turns a prompt's ids back into text, for methods that read the question with another model; None if unknown.
    visual_cache : VisualCache or None
        With one, the vision tower sees an image once, whichever methods prune it, unless gradients are wanted. None,
        the default: every image is encoded whenever it comes.
    visual_token_counts : sequence of (total, kept)
        For each image that stood in a prompt of the latest call, in the order of the rows; kept is what the last
        decoder layer sees.
    visual_tokens_per_layer : sequence of tuple of int
        For the same images, the tokens present in each decoder layer.
    visual_tokens_after_attention : sequence of tuple of int
        For the same images, those in each layer's output projection and feed-forward block: fewer than the layer sees
        where a method drops behind the attention.
    visual_index : Tensor (B, T), int64
        The image that each position of the latest embedded prompts belongs to, -1 for text and padding.
    visual_mask : Tensor (B, T), bool, or None
        False at the padding of those prompts; None where there is none.
    visual_facts : tuple of (ImageTokens, PromptFacts)
        What is known of those images, where the decoder drops tokens.
    """

    prompt_tokenizer = None
    visual_cache: VisualCache | None = None
    visual_token_counts: Sequence[tuple[int, int]] = ()
    visual_tokens_per_layer: Sequence[tuple[int, ...]] = ()
    visual_tokens_after_attention: Sequence[tuple[int, ...]] = ()
    visual_index: torch.Tensor | None = None
    visual_mask: torch.Tensor | None = None
    visual_facts: tuple[tuple[ImageTokens, PromptFacts], ...] = ()
    _pruning: PruningConfig | None = None
    _pruner: Pruner | None = None
    _stages: tuple[tuple[int, float], ...] = ()
    _clip_text = None

    @property
    def pruning(self) -> PruningConfig | None:
        """The active pruning configuration, None when nothing is pruned."""
        return self._pruning

    def set_pruning(self, config: PruningConfig | None) -> None:
        """Prune as ``config`` says from the next call on; None switches pruning off.

        Raises
        ------
        ValueError
            If its layer is not one of this model's, its budget cannot be met by a decoder of this depth, its options
            belong to another model, or it cannot read this vision tower.
        """
        if config is None:
            self.use_pruner(None, ())
            return
        pruner, stages = config.blame(self._accepted)
        self.use_pruner(pruner, stages, config.for_width(self.config.hidden_size))

    def _accepted(self, config: PruningConfig) -> tuple[Pruner, tuple[tuple[int, float], ...]]:
        """The pruner of a configuration and its stages, if they go with this model."""
        pruner = config.for_width(self.config.hidden_size).build_pruner()
        stages = config.stages(self.config.num_hidden_layers)
        pruner.check_tokens(self.tokens_of_an_image())
        tower = self.get_vision_tower()
        if tower is not None:
            pruner.check_encoder(tower.hidden_size)
            EncoderObserver(chain.from_iterable(encoder_outputs(pruner).values()), tower.depth)  # refuses other layers
        return pruner, stages

    def fit_pruning(self) -> None:
        """Let the active method learn from this model where to drop, if it has to; done at the first use otherwise.

        Raises
        ------
        ValueError
            If it cannot.
        """
        config, pruner = self._pruning, self._pruner
        if config is None or self._stages or not pruner.fits:
            return
        stages = self._stages
        self.use_pruner(None, ())
        try:
            stages = pruner.fit(self, config.ratio)
        finally:
            self.use_pruner(pruner, stages, config)

    @property
    def pruner_in_use(self) -> tuple[Pruner | None, tuple[tuple[int, float], ...], PruningConfig | None]:
        """What `use_pruner` takes to bring back what prunes now, fitted or set by hand."""
        return self._pruner, self._stages, self._pruning

    def use_pruner(
        self, pruner: Pruner | None, stages: tuple[tuple[int, float], ...], config: PruningConfig | None = None
    ) -> None:
        """Prune with a method as it is; see `Pruner.stages`. ``config`` is what `pruning` then says, if anything."""
        self._pruner, self._stages, self._pruning = pruner, stages, config

    def tokens_of_an_image(self) -> int | None:
        """Visual tokens of every image of this model; None where that depends on the image, or there is no tower."""
        tower = self.get_vision_tower()
        if tower is None or getattr(self.config, "image_aspect_ratio", None) == "anyres":
            return None
        return tower.num_patches + (tower.select_feature == "cls_patch")

    @property
    def _drops_inside(self) -> bool:
        return bool(self._stages) and not self.prunes_before_decoder

    @property
    def prunes_before_decoder(self) -> bool:
        """Whether tokens are dropped before the splice; else the decoder drops them, or nobody."""
        return bool(self._stages) and self._stages[0][0] == 0 and self._pruner.stage != INSIDE

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) -> projected visual tokens (B, N, D), in the projector's dtype."""
        return self._project(self.get_model().get_vision_tower()(images))

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        projector = self.get_model().mm_projector
        weight = next(projector.parameters(), None)
        if weight is not None:
            features = features.to(device=execution_device(projector), dtype=weight.dtype)
        return projector(features)

    def _encode_and_observe(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`encode_images`, and what the active pruner asks of the vision encoder: (B, N, D), {name: (B, N, ...)}."""
        tower, needs = self.get_vision_tower(), encoder_outputs(self._pruner)
        wanted = dict.fromkeys(output for outputs in needs.values() for output in outputs)
        cache = None if torch.is_grad_enabled() else self.visual_cache
        if cache is None and not wanted:
            return self.encode_images(images), {}

        def encode(pixels: torch.Tensor) -> dict[Output, torch.Tensor]:
            every = wanted if cache is None else wanted | dict.fromkeys(cache.expected)
            if not every:
                return {FEATURES: tower(pixels)}
            features, outputs = tower.observe(pixels, every)
            return {FEATURES: features, **outputs}

        found = encode(images) if cache is None else cache.outputs(images, (FEATURES, *wanted), encode)
        notes = {
            need: torch.stack([found[output] for output in outputs], -1)
            if need == "received_attention"
            else found[outputs[0]]
            for need, outputs in needs.items()
        }
        return self._project(found[FEATURES]), notes

    def visual_tokens(self, images, image_sizes=None) -> list[torch.Tensor]:
        """Every image's visual tokens (N_i, D), as an unpruned model would see them; see `image_tokens`."""
        return [image.features for image in self.image_tokens(images, image_sizes)]

    def image_tokens(self, images, image_sizes=None) -> list[ImageTokens]:
        """Every image's visual tokens, with layout and what the active pruner asks of the vision encoder.

        Parameters
        ----------
        images : Tensor (I, 3, H, W) or (I, T, 3, H, W), or list of Tensor (3, H, W) or (T, 3, H, W)
            Normalised pixels; T crops an image.
        image_sizes : list of (width, height), optional
            Original sizes, needed to merge crops.

        Raises
        ------
        ValueError
            For images of another shape, fewer sizes than images of crops, or an unknown ``mm_patch_merge_type``.
        NotImplementedError
            For several crops of an image without anyres.
        """
        if not check_images(images, image_sizes):
            features, notes = self._encode_and_observe(images)
            layout = layout_of(1, features.shape[1], None, None, spatial=False, newline=False)
            return [
                ImageTokens(row, layout, {name: note[i] for name, note in notes.items()})
                for i, row in enumerate(features)
            ]
        crops = [image.unsqueeze(0) if image.ndim == 3 else image for image in images]  # (T_i, 3, H, W) each
        features, notes = self._encode_and_observe(torch.cat(crops))
        counts = [len(image) for image in crops]
        split = {name: note.split(counts) for name, note in notes.items()}
        sizes = image_sizes if image_sizes is not None else [None] * len(crops)
        return [
            self._merged(row, {name: notes[i] for name, notes in split.items()}, size)
            for i, (row, size) in enumerate(zip(features.split(counts), sizes, strict=False))
        ]

    def _merged(
        self, features: torch.Tensor, notes: dict[str, torch.Tensor], size: tuple[int, int] | None
    ) -> ImageTokens:
        """(T, P, D) crops of one image, and notes (T, P, ...) -> one sequence."""
        crops, patches, _ = features.shape
        merge_type = getattr(self.config, "mm_patch_merge_type", "flat")
        if merge_type == "flat":
            flat = {name: note.flatten(0, 1) for name, note in notes.items()}
            return ImageTokens(features.flatten(0, 1), layout_of(crops, patches, None, None, False, False), flat)
        if not merge_type.startswith("spatial"):
            raise ValueError(f"Unexpected mm_patch_merge_type: {merge_type}")
        newline = parameter_here(self.get_model(), "image_newline").to(features) if "unpad" in merge_type else None
        grid = None if crops == 1 else crop_grid(crops, size, self.config, self.get_vision_tower())

        def merged_note(note: torch.Tensor) -> torch.Tensor:
            values = note if note.ndim == 3 else note.unsqueeze(-1)  # (T, P, C)
            merged = merge_crops(values, size, grid, None if newline is None else values.new_zeros(values.shape[-1]))
            return merged if note.ndim == 3 else merged.squeeze(-1)

        return ImageTokens(
            merge_crops(features, size, grid, newline),
            layout_of(crops, patches, size, grid, spatial=True, newline=newline is not None),
            {name: merged_note(note) for name, note in notes.items()},
        )

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
        tuple
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
        if not check_images(images, image_sizes):
            image_sizes = None
        self.fit_pruning()
        if getattr(self.config, "tune_mm_mlp_adapter", False) and getattr(self.config, "mm_use_im_start_end", False):
            raise NotImplementedError("tune_mm_mlp_adapter together with mm_use_im_start_end is not supported")

        device = input_ids.device
        input_ids = input_ids.cpu()  # one look at a batch, instead of several at each row
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
        ids_rows = [ids[mask] for ids, mask in zip(input_ids, valid, strict=True)]
        if labels is None:
            label_rows = [torch.full_like(ids, IGNORE_INDEX) for ids in ids_rows]
        else:
            label_rows = [row[mask] for row, mask in zip(labels.cpu(), valid, strict=True)]

        images_of_rows = assign_images([int((ids == IMAGE_TOKEN_INDEX).sum()) for ids in ids_rows], len(images))
        # A row that takes an image and has no mark for it does not use it.
        asked = [(image, ids_rows[row], label_rows[row]) for row, own in enumerate(images_of_rows) for image in own]
        spans = self._spans(asked, images, image_sizes)
        self._count(spans)

        limit = getattr(self.config, "tokenizer_model_max_length", None)
        numbered = iter(enumerate(spans))
        prompts = stack(
            [
                lay_out(ids, row_labels, list(islice(numbered, len(row_images)))).cut(limit)
                for ids, row_labels, row_images in zip(ids_rows, label_rows, images_of_rows, strict=True)
            ],
            left=getattr(self.config, "tokenizer_padding_side", "right") == "left",
        )
        # Copies to a GPU wait for what it does, unless they are told not to.
        self.visual_index = prompts.images.to(device, non_blocking=True)
        mask = prompts.mask.to(device, non_blocking=True)
        self.visual_mask = None if bool(prompts.mask.all()) else mask
        gaps = self.prunes_before_decoder and self._pruner.position_ids == "original"
        positions = original_positions(prompts, device) if gaps else None
        if position_ids is not None and not gaps:
            positions = (mask.cumsum(1) - 1).masked_fill(~mask, 0)
        if positions is not None and past_key_values is not None:
            positions += Filling.of(past_key_values, device).following
        return (
            None,
            positions,
            # Without a mask, gaps in the positions would be read as borders between packed sequences.
            (mask if gaps else None) if attention_mask is None else mask.to(attention_mask.dtype),
            past_key_values,
            embed(prompts, lambda ids: self.get_model().embed_tokens(ids.to(device, non_blocking=True))),
            None if labels is None else prompts.labels.to(device, non_blocking=True),
        )

    def _spans(self, asked: Sequence[tuple[int, torch.Tensor, torch.Tensor]], images, image_sizes) -> list[Span]:
        """What stands in each image's place, encoded and pruned now.

        Parameters
        ----------
        asked : sequence of (image, ids (T,), labels (T,)), the latter on the host
            Which of ``images``, and the row that asks about it.
        """
        numbers = list(dict.fromkeys(image for image, _, _ in asked))
        if len(numbers) == len(images):
            encoded = dict(enumerate(self.image_tokens(images, image_sizes)))
        else:
            chosen = [images[image] for image in numbers]
            if isinstance(images, torch.Tensor) and chosen:
                chosen = torch.stack(chosen)  # an index would be brought to the GPU first
            sizes = None if image_sizes is None else [image_sizes[image] for image in numbers]
            encoded = dict(zip(numbers, self.image_tokens(chosen, sizes), strict=True)) if numbers else {}
        visual = [encoded[image] for image, _, _ in asked]
        facts = [self._prompt_facts(encoded[image], images[image], ids, labels) for image, ids, labels in asked]
        self.visual_facts = tuple(zip(visual, facts, strict=True)) if self._drops_inside else ()
        if not self.prunes_before_decoder:
            return [Span.whole(image.features) for image in visual]
        kept = reduce_images(self._pruner, visual, facts, self._stages[0][1])
        return [
            Span(left.features, left.indices, len(image.features)) for left, image in zip(kept, visual, strict=True)
        ]

    def _prompt_facts(self, image: ImageTokens, pixels, ids: torch.Tensor, labels: torch.Tensor) -> PromptFacts:
        """What the active pruner asks of an image's content and of the question about it."""
        needs = self._pruner.needs if self._pruner is not None else frozenset()
        behind = (ids == IMAGE_TOKEN_INDEX).cumsum(0) > 0
        # What is to be predicted is no part of the question.
        asked = ids[behind & (ids != IMAGE_TOKEN_INDEX) & (labels == IGNORE_INDEX)]
        embed_tokens = self.get_model().embed_tokens
        return PromptFacts(
            key=content_key(pixels) if "image_keys" in needs else None,
            question=embed_tokens(asked.to(image.features.device, non_blocking=True)) if "question" in needs else None,
            similarity=self._text_similarity(image, asked) if "text_similarity" in needs else None,
        )

    def _text_similarity(self, image: ImageTokens, asked: torch.Tensor) -> torch.Tensor:
        """Each token's similarity to the question (T,) in CLIP's common space: (N,); newlines get the mean."""
        from llava.model.multimodal_encoder.clip_text import ClipText, question_text

        if self._clip_text is None:
            tower = self.get_vision_tower()
            self._clip_text = ClipText(tower.vision_tower_name, tower.hub)
        if self.prompt_tokenizer is None:
            raise ValueError("the model has no prompt_tokenizer to read the question with: use load_pretrained_model")
        question = question_text(self.prompt_tokenizer.decode(asked, skip_special_tokens=True))
        similarity = self._clip_text.similarity(image.notes["encoder_features"][None], question)[0]
        if image.layout is not None:
            newlines = torch.cat([part.is_newline() for part in image.layout])
            newlines = newlines.to(similarity.device, non_blocking=True)
            similarity = similarity.masked_fill(newlines, similarity[~newlines].mean())
        return similarity

    def _count(self, spans: Sequence[Span]) -> None:
        """Note how many tokens of each image every decoder layer sees."""
        depth = self.config.num_hidden_layers
        if self.prunes_before_decoder:
            self.visual_tokens_per_layer = [(len(span.features),) * depth for span in spans]
        else:
            budget = kept_count if self._pruner is None else self._pruner.budget
            self.visual_tokens_per_layer = [
                tuple(kept_per_layer(self._stages, span.total, depth, budget)) for span in spans
            ]
        self.visual_tokens_after_attention = self.visual_tokens_per_layer
        if self._pruner is not None and self._pruner.after_attention:
            self.visual_tokens_after_attention = [
                tuple(kept_after_attention(self._stages, span.total, depth, self._pruner.budget)) for span in spans
            ]
        self.visual_token_counts = [
            (span.total, layers[-1]) for span, layers in zip(spans, self.visual_tokens_per_layer, strict=True)
        ]

    def initialize_vision_tokenizer(self, model_args, tokenizer) -> None:
        """Add the image marker tokens that ``model_args`` asks for, before training.

        ``mm_use_im_patch_token`` and ``mm_use_im_start_end`` add tokens; new ones start as the mean embedding. With
        ``tune_mm_mlp_adapter`` the input embeddings are trained and the output embeddings are not;
        ``pretrain_mm_mlp_adapter`` names a file that holds trained embeddings of the start and end tokens.
        """
        if model_args.mm_use_im_patch_token:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
            self.resize_token_embeddings(len(tokenizer))
        if not model_args.mm_use_im_start_end:
            if model_args.mm_use_im_patch_token and model_args.tune_mm_mlp_adapter:
                self.get_input_embeddings().requires_grad_(False)
                self.get_output_embeddings().requires_grad_(False)
            return
        added = tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
        self.resize_token_embeddings(len(tokenizer))
        if added:
            for embedding in (self.get_input_embeddings().weight.data, self.get_output_embeddings().weight.data):
                embedding[-added:] = embedding[:-added].mean(dim=0, keepdim=True)
        if model_args.tune_mm_mlp_adapter:
            self.get_input_embeddings().requires_grad_(True)
            self.get_output_embeddings().requires_grad_(False)
        if model_args.pretrain_mm_mlp_adapter:
            weights = read_tensors(Path(model_args.pretrain_mm_mlp_adapter))
            trained = weights["model.embed_tokens.weight"]
            self.get_input_embeddings().weight.data[-added:] = trained[-added:]


def left_padding_order(mask: torch.Tensor) -> torch.Tensor | None:
    """How to reorder every row so that its content stands at the right end and generation continues there.

    Parameters
    ----------
    mask : Tensor (B, T)
        Nonzero where there is content.

    Returns
    -------
    Tensor (B, T), int64
        Padding first, then the content in its order; None where nothing has to move.
    """
    if bool(mask[:, -1].all()):
        return None
    return mask.bool().int().argsort(dim=1, stable=True)
