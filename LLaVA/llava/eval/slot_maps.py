"""Slot maps: how OC-VTP's slots divide an image, and which of its tokens they claim."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from llava.eval.encoder import Encoder
from llava.eval.views import View
from llava.pruning import PruningConfig
from llava.pruning.methods.ocvtp.pruner import claims
from llava.pruning.own_budget import count_of
from llava.pruning.tokens import VisualTokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NONE = -1
TINT = 0.55
GOLDEN_RATIO = 0.618034


@dataclass(frozen=True)
class SlotMap:
    """One image's slots, as arrays (N,).

    ``slot`` is the one that attends most to each token, `NONE` for a newline; ``claimed`` are the tokens that a slot
    claims, ``kept`` those that are kept, of which unclaimed ones fill the budget.
    """

    slot: np.ndarray
    claimed: np.ndarray
    kept: np.ndarray


@torch.no_grad()
def slot_map(encoder: Encoder, image: Image.Image, config: PruningConfig) -> SlotMap:
    """The slots of one image under ``config``, of the method ocvtp.

    Slots of single crops, or of distinct patches alone, are a `ValueError`.
    """
    pruner = config.build_pruner()
    for option in ("per_crop", "drop_duplicates"):
        if getattr(pruner, option):
            raise ValueError(f"only slots of all tokens are drawn: leave out OCVTP_{option.upper()}")
    found = encoder.encode(image, config)
    n = len(found.features)
    k = count_of(pruner, found.features, config.ratio) if pruner.target is None else min(pruner.target, n)
    tokens = VisualTokens.of([found], k)
    attention = pruner.slot_attention(tokens, 0, k)
    slot = torch.where(torch.isinf(attention[0]), NONE, attention.argmax(dim=0))
    kept = torch.zeros(n, dtype=torch.bool)
    kept[pruner.indices(tokens)[0].cpu()] = True
    claimed = (claims(attention, pruner.top_k) > -torch.inf).cpu() & kept
    return SlotMap(slot.cpu().numpy(), claimed.numpy(), kept.numpy())


def draw_slots(views: Sequence[View], found: SlotMap) -> Figure:
    """A row per view, the slots' regions on the left, what is kept of them on the right.

    A dot marks a token that its slot claimed; kept tokens without one fill the budget.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.5 * len(views)), layout="constrained")
    axes = figure.subplots(len(views), 2, squeeze=False)
    for (left, right), view in zip(axes, views, strict=True):
        slot, claimed, kept = (part[view.patches] for part in (found.slot, found.claimed, found.kept))
        colours = np.array([_colour(number) for number in slot.ravel().tolist()]).reshape(*slot.shape, 3)
        tinted = (1 - TINT) * view.pixels() + TINT * view.enlarged(colours)
        left.imshow(tinted.astype(np.uint8), interpolation="nearest")
        left.set_title(f"{len(np.unique(slot))} slots win patches ({view.name})", fontsize=11)
        right.imshow(np.where(view.enlarged(kept), tinted, 235).astype(np.uint8), interpolation="nearest")
        y, x = (claimed.nonzero() + np.array(0.5)) * view.scale
        right.scatter(x, y, s=9, c="white", edgecolors="black", linewidths=0.6)
        right.set_title(f"{kept.sum()} kept, {claimed.sum()} claimed by slots", fontsize=11)
        for axis in (left, right):
            axis.set_axis_off()
    return figure


def _colour(slot: int) -> tuple[float, float, float]:
    """A slot's colour, 0 to 255: neighbours in number are far apart in hue."""
    if slot == NONE:
        return (128.0, 128.0, 128.0)
    saturation, brightness = (1.0, 0.55)[slot % 2], (1.0, 0.75)[slot % 3 == 0]
    red, green, blue = colorsys.hsv_to_rgb(slot * GOLDEN_RATIO % 1, saturation, brightness)
    return (255 * red, 255 * green, 255 * blue)
