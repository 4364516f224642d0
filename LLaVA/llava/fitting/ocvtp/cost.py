"""What a pruner costs beside the model that it saves tokens for, in FLOPs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.command import EMBEDDED, RATIO
from llava.flops import TowerShape, exact_flops, load_shape, load_tower, tokens_per_layer
from llava.pruning import kept_count
from llava.pruning.methods.ocvtp.checkpoint import PrunerFiles
from llava.pruning.methods.ocvtp.network import SlotConfig, SlotPruner


def pruner_flops(config: SlotConfig, tokens: int, slots: int) -> int:
    """FLOPs of a pruner on one image of N ``tokens``, two per multiply-accumulate."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        SlotPruner(config).eval()(torch.empty(1, tokens, config.width), torch.empty(1, slots, config.slot_width))
    return counter.get_total_flops()


def padding_flops(tower: TowerShape) -> int:
    """FLOPs of a crop's attention in one layer, queries and keys included: what the rest of the budget is ranked by.

    The layer computes them too, but its fused kernel keeps them to itself.
    """
    rows = tower.patches + 1
    return 2 * (2 * rows * tower.hidden**2 + rows**2 * tower.hidden)


def cost(model: str, checkpoint: str | None, kept: int | None, text: int) -> str:
    """A table: the pruner, and the model's prefill with and without it.

    ``model`` is one of `llava.flops.load_shape`; ``checkpoint`` a pruner, None for the published sizes at the width of
    the model's vision tower, and for llava-mini's own; ``kept`` and ``text`` are visual tokens kept, by default the
    published 0.098 of them, and text tokens. An OSError or ValueError if the checkpoint is missing or damaged, or reads
    features of another width.
    """
    shape, tower = load_shape(model), load_tower(model)
    if checkpoint is None and model == EMBEDDED:
        checkpoint = EMBEDDED
    config = SlotConfig(width=tower.hidden) if checkpoint is None else PrunerFiles.find(checkpoint).config
    if config.width != tower.hidden:
        raise ValueError(
            f"{checkpoint} reads features of width {config.width}, but those of {model} have {tower.hidden}"
        )
    tokens = shape.visual_tokens
    kept = kept_count(tokens, RATIO) if kept is None else kept
    if kept > tokens:
        raise ValueError(f"--kept {kept}: {model} has {tokens} visual tokens")
    slots = min(kept + 1, tokens)
    full, pruned = (
        exact_flops(shape, tokens_per_layer(text, [count] * shape.decoder.layers)) for count in (tokens, kept)
    )
    flops = {
        "pruner": pruner_flops(config, tokens, slots),
        "padding attention": shape.crops * padding_flops(tower),
        "vision tower": full.vision_tower,
        "projector": full.projector,
        "decoder, unpruned": full.decoder + full.lm_head,
        "decoder, pruned": pruned.decoder + pruned.lm_head,
    }
    alone, padding = (100 * flops[part] / full.total for part in ("pruner", "padding attention"))
    return "\n".join(
        [
            f"{model}: {tokens} visual tokens, {kept} kept, {slots} slots, {text} text tokens; GFLOPs:",
            *(f"{part:22}{count / 1e9:12.3f}" for part, count in flops.items()),
            f"The pruner is {alone:.3f} % of the unpruned prefill ({alone + padding:.3f} % with the padding attention)",
        ]
    )
