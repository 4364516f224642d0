"""The two counts of a prefill: the papers' formula, and every matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from llava.flops.shape import DecoderShape, ModelShape

if TYPE_CHECKING:
    from llava.pruning import PruningConfig

UNITS = {"literature": "MACs", "exact": "FLOPs"}
"""What each convention counts; the papers call theirs FLOPs, too."""


def visual_per_layer(config: PruningConfig, visual: int, layers: int) -> tuple[list[int], list[int]]:
    """Visual tokens, of ``visual`` of an image, in each layer, and after its attention.

    If the number depends on the image, or on a recipe that is fitted to a model, it is a `ValueError`.
    """
    from llava.pruning.schedule import kept_after_attention, kept_per_layer

    pruner = config.build_pruner()
    if not pruner.count_is_known:
        raise ValueError(f"how many tokens {config.method} keeps with these options depends on the image")
    schedule = config.schedule(layers)
    if not schedule:
        raise ValueError(f"how many tokens {config.method} keeps in each layer is fitted to a model: give a recipe")
    pruner.check_model(visual, None)
    entering = kept_per_layer(schedule, visual, layers, pruner.kept_count)
    return entering, kept_after_attention(
        schedule, visual, layers, pruner.kept_count
    ) if pruner.after_attention else entering


def tokens_per_layer(text: int, visual_per_layer: Sequence[int]) -> list[int]:
    """The tokens in each decoder layer: text and visual ones."""
    return [text + visual for visual in visual_per_layer]


def literature_flops(shape: DecoderShape, tokens: Sequence[int], *, after: Sequence[int] | None = None) -> int:
    """The papers' count: the sum of ``4 n d^2 + 2 n^2 d + 2 n d m`` over the layers.

    Multiply-accumulates, though the papers print them as FLOPs; a feed-forward block of two matrices, though Llama's
    has three; no vision tower, no vocabulary, no selection.

    Parameters
    ----------
    shape : DecoderShape
    tokens : sequence of int
        n of each layer, text included.
    after : sequence of int, optional
        The same after the attention, ``n d^2 + 2 n d m`` of the above, where tokens leave in between.

    Raises
    ------
    ValueError
        If there is not one number per layer.

    Source: DivPrune, CVPR 2025.
    """
    d, m = shape.hidden, shape.intermediate
    pairs = _checked(shape, tokens, after)
    return sum(3 * n * d**2 + 2 * n**2 * d + left * d**2 + 2 * left * d * m for n, left in pairs)


@dataclass(frozen=True)
class ExactFlops:
    """FLOPs of one prompt's prefill, by part."""

    vision_tower: int
    projector: int
    decoder: int
    lm_head: int

    @property
    def total(self) -> int:
        return self.vision_tower + self.projector + self.decoder + self.lm_head

    def to_dict(self) -> dict[str, int]:
        """The parts, and their sum as "total"."""
        return asdict(self) | {"total": self.total}


def exact_flops(
    shape: ModelShape,
    tokens: Sequence[int],
    *,
    after: Sequence[int] | None = None,
    crops: int | Sequence[int] | None = None,
    logits: int = 1,
) -> ExactFlops:
    """What a prefill computes: every matrix product and convolution, two FLOPs per multiply-accumulate.

    Attention is counted over all n^2 pairs, as `torch.utils.flop_counter` does: a kernel that skips the causal half
    does less. Norms, activations, rotations and the softmax are left out, and so is the selection.

    Parameters
    ----------
    shape : ModelShape
    tokens : sequence of int
        Tokens in each decoder layer, text included.
    after : sequence of int, optional
        Those in its output projection and feed-forward block, where tokens leave after the attention.
    crops : int or sequence of int, optional
        Crops of the image, or of each image; the shape's own if left out, 0 for a prompt without an image.
    logits : int
        Positions that get logits: 1 in generation, all of the last layer's in a plain forward pass.

    Raises
    ------
    ValueError
        If there is not one number of tokens per layer.
    """
    pairs = _checked(shape.decoder, tokens, after)
    crops = shape.crops if crops is None else crops
    images = [crops] if isinstance(crops, int) else crops
    return ExactFlops(
        vision_tower=sum(map(shape.tower.flops, images)),
        projector=sum(map(shape.projector.flops, images)),
        decoder=sum(cost.flops(*pair) for cost, pair in zip(shape.decoder.costs, pairs, strict=True)),
        lm_head=2 * logits * shape.decoder.hidden * shape.decoder.vocabulary,
    )


def _checked(shape: DecoderShape, tokens: Sequence[int], after: Sequence[int] | None) -> list[tuple[int, int]]:
    """Of each layer the tokens that enter, and those after its attention."""
    after = tokens if after is None else after
    for counts in (tokens, after):
        if len(counts) != shape.layers:
            raise ValueError(
                f"the decoder has {shape.layers} layers and needs a number of tokens for each, not {len(counts)}"
            )
        if min(counts) < 0:
            raise ValueError(f"a layer has at least 0 tokens, not {min(counts)}")
    return list(zip(tokens, after, strict=True))
