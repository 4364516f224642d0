"""What a prefill costs, with and without pruning, in two named conventions.

"literature" is the pruning papers' count: multiply-accumulates of a decoder whose feed-forward block has two matrices.
"exact" is what the model computes: two FLOPs per multiply-accumulate, vision tower included.
"""

from llava.flops.count import (
    UNITS,
    ExactFlops,
    exact_flops,
    literature_flops,
    tokens_per_layer,
    visual_per_layer,
)
from llava.flops.shape import (
    BENCHMARK_TOKENS,
    SHAPES,
    USUAL_TEXT,
    Cost,
    DecoderShape,
    ModelShape,
    TowerShape,
    load_shape,
    load_tower,
)

__all__ = [
    "BENCHMARK_TOKENS",
    "SHAPES",
    "UNITS",
    "USUAL_TEXT",
    "Cost",
    "DecoderShape",
    "ExactFlops",
    "ModelShape",
    "TowerShape",
    "exact_flops",
    "literature_flops",
    "load_shape",
    "load_tower",
    "tokens_per_layer",
    "visual_per_layer",
]
