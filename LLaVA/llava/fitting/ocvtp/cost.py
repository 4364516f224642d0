"""What a pruner costs beside the model that it saves tokens for: FLOPs, and milliseconds of layers of its shape."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from llava.eval.flops import ModelShape, TowerShape, exact_flops, load_shape, tokens_per_layer
from llava.model.multimodal_encoder.observations import received_attention
from llava.pruning import kept_count
from llava.pruning.methods.ocvtp.checkpoint import EMBEDDED, PrunerFiles
from llava.pruning.methods.ocvtp.config import SlotConfig
from llava.pruning.methods.ocvtp.network import SlotPruner, slot_noise
from llava.pruning.methods.ocvtp.pruner import claims, fill
from llava.runtime import device_name

RATIO = 0.098
REPEATS, SECONDS = 3, 0.2
"""Runs of a part after the first, at least, and how long they take together: what is short is repeated more often."""


def pruner_flops(config: SlotConfig, tokens: int, slots: int) -> int:
    """FLOPs of a pruner: every matrix product, two FLOPs a multiply-accumulate.

    Parameters
    ----------
    config : SlotConfig
    tokens, slots : int
        N and S of one image.
    """
    d = config.slot_width
    projection = tokens * config.hidden * (config.width + d)
    keys_and_values = 2 * tokens * d**2
    per_iteration = slots * d**2 + 2 * slots * tokens * d + 6 * slots * d**2 + 2 * slots * d * config.feed_forward
    return 2 * (projection + keys_and_values + config.iterations * per_iteration)


def padding_flops(tower: TowerShape) -> int:
    """FLOPs of a crop's attention in one layer, queries and keys included: what the rest of the budget is ranked by.

    The layer computes them too, but its fused kernel keeps them to itself.
    """
    rows = tower.patches + 1
    return 2 * (2 * rows * tower.hidden**2 + rows**2 * tower.hidden)


def cost(model: str, checkpoint: str | None, kept: int | None, text: int, device: str, timed: bool) -> str:
    """A table: the pruner, and the model's prefill with and without it.

    Parameters
    ----------
    model : str
        See `llava.eval.flops.load_shape`.
    checkpoint : str or None
        A pruner; None for the published sizes at the width of the model's vision tower, and for llava-mini's own.
    kept : int or None
        Visual tokens kept; the published 0.098 of them if left out.
    text : int
        Text tokens.
    device : str
        Where to measure.
    timed : bool
        Whether to measure milliseconds.

    Raises
    ------
    OSError
        If there is no such model or pruner.
    ValueError
        If the pruner is not for features of this width, more tokens are to be kept than there are, or the device is
        not there.
    """
    if timed:
        _check_device(device)
    shape = load_shape(model)
    if checkpoint is None and model == EMBEDDED:
        checkpoint = EMBEDDED
    config = SlotConfig(width=shape.tower.hidden) if checkpoint is None else PrunerFiles.find(checkpoint).config
    if config.width != shape.tower.hidden:
        raise ValueError(
            f"the pruner {checkpoint} reads features of width {config.width}, but those of {model} have "
            f"{shape.tower.hidden}"
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
        "padding attention": shape.crops * padding_flops(shape.tower),
        "vision tower": full.vision_tower,
        "projector": full.projector,
        "decoder, unpruned": full.decoder + full.lm_head,
        "decoder, pruned": pruned.decoder + pruned.lm_head,
    }
    times = _milliseconds(shape, config, text, kept, slots, device) if timed else {}
    where = f", {_place(device)}" if timed else ""
    lines = [f"{model}: {tokens} visual tokens, {kept} kept, {slots} slots, {text} text tokens{where}", ""]
    lines.append(f"{'':22}{'GFLOPs':>12}" + (f"{'ms':>12}" if times else ""))
    for part, count in flops.items():
        lines.append(f"{part:22}{count / 1e9:12.3f}" + (f"{times[part]:12.1f}" if part in times else ""))
    lines += ["", f"The pruner is {_shares(flops, full.total, 3)} of the unpruned prefill in FLOPs"]
    if times:
        lines[-1] += f", {_shares(times, times['vision tower'] + times['decoder, unpruned'], 2)} in time"
        lines.append("(one layer of vision tower and decoder with random weights was timed, times their number).")
    return "\n".join(lines)


def _shares(amounts: dict[str, float], whole: float, decimals: int) -> str:
    """The pruner's share, and the one with the attention that pads its choice."""
    alone, padding = (100 * amounts[part] / whole for part in ("pruner", "padding attention"))
    return f"{alone:.{decimals}f} % ({alone + padding:.{decimals}f} % with the padding attention)"


def _milliseconds(
    shape: ModelShape, config: SlotConfig, text: int, kept: int, slots: int, device: str
) -> dict[str, float]:
    """Of the pruner with its choice of tokens, and of the towers' layers."""
    from transformers import CLIPVisionConfig, LlamaConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    dtype = torch.float32 if device == "cpu" else torch.float16
    tower, decoder = shape.tower, shape.decoder
    vision = CLIPEncoderLayer(
        CLIPVisionConfig(
            hidden_size=tower.hidden,
            intermediate_size=tower.intermediate,
            num_attention_heads=max(1, tower.hidden // 64),
            attn_implementation="sdpa",
        )
    ).to(device, dtype)
    head = 128 if decoder.query_width % 128 == 0 else 64
    language_config = LlamaConfig(
        hidden_size=decoder.hidden,
        intermediate_size=decoder.intermediate,
        num_attention_heads=decoder.query_width // head,
        num_key_value_heads=decoder.key_width // head,
        head_dim=head,
        attn_implementation="sdpa",
    )
    language = LlamaDecoderLayer(language_config, 0).to(device, dtype)
    rotary = LlamaRotaryEmbedding(language_config).to(device)
    pruner = SlotPruner(config).to(device).eval()
    noise = slot_noise(0, slots, config.slot_width).to(device)

    def rows(tokens: int, width: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(1, tokens, width, device=device, dtype=kind)

    def decode(length: int) -> float:
        hidden, positions = rows(length, decoder.hidden), torch.arange(length, device=device)[None]
        around = rotary(hidden, positions)
        return decoder.layers * _timed(
            lambda: language(hidden, position_ids=positions, position_embeddings=around), device
        )

    tokens = shape.visual_tokens
    crop, features = rows(tower.patches + 1, tower.hidden), rows(tokens, tower.hidden, torch.float32)
    padding = torch.rand(tokens, device=device)
    return {
        "pruner": _timed(lambda: fill(claims(pruner(features, noise)[1][0], top_k=1), padding, kept), device),
        "padding attention": shape.crops * _timed(lambda: received_attention(vision, crop), device),
        "vision tower": shape.crops * tower.layers * _timed(lambda: vision(crop, None), device),
        "decoder, unpruned": decode(text + tokens),
        "decoder, pruned": decode(text + kept),
    }


@torch.no_grad()
def _timed(work: Callable[[], object], device: str) -> float:
    """Milliseconds of the fastest of several runs after a first one."""
    times = []
    while len(times) <= REPEATS or sum(times[1:]) < SECONDS:
        began = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 1000 * min(times[1:])


def _check_device(device: str) -> None:
    """A CPU, or a GPU of this machine: the clock waits for no other device."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: must be cpu, cuda, cuda:1 or the like")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")


def _place(device: str) -> str:
    """What was measured on."""
    if device.startswith("cuda"):
        return device_name(device)
    threads = torch.get_num_threads()
    return f"{device_name(device)}, {threads} {'thread' if threads == 1 else 'threads'}"
