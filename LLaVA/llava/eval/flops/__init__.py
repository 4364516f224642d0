"""What a prefill costs, with and without pruning, in two named conventions.

"literature" is the count of the pruning papers: multiply-accumulates of a decoder whose feed-forward block has two
matrices. "exact" is what the model computes: two FLOPs per multiply-accumulate, vision tower included.

``python -m llava.eval.flops --model 1.5-7b --text 60 --method otprune --ratio 0.098``
"""

from llava.eval.flops.count import (
    UNITS,
    ExactFlops,
    exact_flops,
    literature_flops,
    tokens_per_layer,
    visual_per_layer,
)
from llava.eval.flops.shape import (
    BENCHMARK_TOKENS,
    SHAPES,
    USUAL_TEXT,
    DecoderShape,
    ModelShape,
    TowerShape,
    load_shape,
)

__all__ = [
    "BENCHMARK_TOKENS",
    "SHAPES",
    "UNITS",
    "USUAL_TEXT",
    "DecoderShape",
    "ExactFlops",
    "ModelShape",
    "TowerShape",
    "exact_flops",
    "literature_flops",
    "load_shape",
    "tokens_per_layer",
    "visual_per_layer",
]
