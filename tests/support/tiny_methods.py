"""What the methods need beside their defaults in a model as small as `tiny_llava`'s."""

from __future__ import annotations

from pathlib import Path

OPTIONS = {
    "hiprune": {"object_layer": 1},
    "flowcut": {"layers": 1},
    "vscan": {"local_layer": 1},
    "cdpruner": {"relevance": "embeddings"},
    "fitprune": {"recipe": str(Path(__file__).parent / "recipe_of_four_layers.json"), "scale": True},
}

TWICE = {"local_layer": 1, "second_ratio": 0.5}
"""Options of VScan with which it drops before the decoder and inside it."""

RATIOS = {"fitprune": 0.5, "pyramiddrop": 0.5, "sparsevlm": 0.6, "vtw": 0.5}
"""Methods that drop at several layers meet no ratio of 0.3 in four layers; it is a mean over them."""
