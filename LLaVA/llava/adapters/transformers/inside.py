"""Drops inside the decoder of any model of transformers, by hooks on its layers.

At the input of a layer of the schedule a pre-hook drops image tokens from the hidden states; from there on each layer
gets rotary embeddings, mask and length of cache for what is left. Attention that a method ranks by is read where the
layer before computes it. Decoding steps see, layer by layer, what the prefill left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_masks_for_generate

from llava.adapters.transformers.attention import Call, Watch
from llava.adapters.transformers.family import Model
from llava.adapters.transformers.images import PromptImage
from llava.adapters.transformers.inputs import CACHE, kept_positions, kept_rotary
from llava.pruning.attention import attention_of_queries, received_by_images
from llava.pruning.base import Pruner
from llava.pruning.rows import (
    CACHE_NAMES,
    TEXT,
    KeptColumns,
    Rows,
    cache_of,
    choose_raters,
    drop_image_tokens,
    refuse_images_without_text,
)
from llava.pruning.signals import DECODER_SIGNALS
from llava.pruning.tokens import ImageTokens

STATES = frozenset({"states", "text_states"})
"""The input of the layer at which tokens are dropped."""
AHEAD = frozenset({"next_attention"})
"""Attention of that layer: it is run up to there once more."""
BEFORE = DECODER_SIGNALS - AHEAD - STATES
"""Attention, or keys, of the layer before."""
WITHOUT_KEYS = ("linear_attention", "conv")
"""Kinds of layers that keep a running state instead of keys and values."""


@dataclass
class Pass:
    """A call of the model in which layers see to what is left of the prompts.

    Attributes
    ----------
    left : dict of int to KeptColumns
        Layer at whose input tokens were dropped -> what it and the deeper ones hold.
    following : Tensor (B, M), or None
        In a decoding step the caller's mask of all columns after the prompts.
    rows : Rows, or None
        In a prefill the prompts at the present layer; its images, and token types, which masks are made from.
    raters : Tensor (B, T), or None
        See `choose_raters`.
    seen : dict of str to Tensor (B, T, ...)
        Signals for the next drop.
    masks : dict
        (layer of the last drop, kind of layer) -> attention mask.
    """

    left: dict[int, KeptColumns]
    following: torch.Tensor | None = None
    rows: Rows | None = None
    images: Sequence[ImageTokens] = ()
    types: Mapping[str, torch.Tensor] = field(default_factory=dict)
    raters: torch.Tensor | None = None
    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[tuple[int, str | None], Any] = field(default_factory=dict)


class InsideDecoder:
    """The hooks on a decoder's layers.

    Parameters
    ----------
    model
        A vision-language model of transformers.
    pruner : Pruner
    schedule : sequence of (layer, fraction)
        See `Pruner.schedule_for`.

    Raises
    ------
    ValueError
        If the method cannot work in this decoder.
    """

    def __init__(self, model: Model, pruner: Pruner, schedule: Sequence[tuple[int, float]]):
        self.model, self.pruner, self.decoder = model, pruner, model.get_decoder()
        self.layers = self.decoder.layers
        # A drop after the last layer's attention saves that layer's feed-forward block alone.
        self.schedule = {layer: fraction for layer, fraction in schedule if layer < len(self.layers)}
        self.kinds = getattr(self.decoder.config, "layer_types", None) or [None] * len(self.layers)
        kind = type(pruner).__name__
        if getattr(model, "_tp_size", None) not in (None, 1) and pruner.needs & DECODER_SIGNALS:
            raise ValueError(f"{kind} ranks by all attention heads, which tensor parallel processes share")
        if pruner.position_ids == "compact":
            raise ValueError("positions cannot be renumbered inside the decoder of a model of transformers (compact)")
        looks = {layer for layer in self.schedule if pruner.needs & AHEAD}
        looks |= {layer - 1 for layer in self.schedule if pruner.needs & BEFORE}
        for looked_at in sorted(looks):
            if not hasattr(self.layers[looked_at], "self_attn"):
                raise ValueError(f"{kind} ranks by the attention of decoder layer {looked_at}, which has none")
        self._pass: Pass | None = None

    def attach(self, hooks: ExitStack) -> None:
        """Hook into the decoder, until ``hooks`` is closed."""
        for depth, layer in enumerate(self.layers):
            hook = layer.register_forward_pre_hook(self._before_layer(depth), with_kwargs=True)
            hooks.callback(hook.remove)
            if depth + 1 in self.schedule and self.pruner.needs & BEFORE:
                hooks.callback(Watch(layer.self_attn, self._look).remove)
        if hasattr(self.decoder, "_deepstack_process"):
            original = self.decoder._deepstack_process
            self.decoder._deepstack_process = lambda hidden, marks, features: original(
                hidden, *self._deepstack(marks, features)
            )
            hooks.callback(self.decoder.__dict__.pop, "_deepstack_process")

    # A call of the model

    def start(
        self,
        valid: torch.Tensor,
        images: Sequence[PromptImage],
        prompt: torch.Tensor,
        types: Mapping[str, torch.Tensor],
        entered: KeptColumns,
    ) -> None:
        """A prefill begins.

        Parameters
        ----------
        valid : Tensor (B, T), bool
            False at padding.
        images : sequence of PromptImage
            In the order of their placeholders.
        prompt : Tensor (B, T), bool
            False at padding and at what is to be predicted.
        types : mapping of str to Tensor (B, T')
            Token types, which masks are made from.
        entered : KeptColumns
            What of the prompts enters the decoder, T' of T columns.
        """
        if self.model.training and _checkpoints_activations(self.model):
            raise NotImplementedError("gradient checkpointing runs layers twice, which drops inside the decoder refuse")
        image_id = torch.full(valid.shape, TEXT)
        for number, image in enumerate(images):
            image_id[image.row, image.columns] = number
        nothing = valid.new_zeros(*valid.shape, 0, dtype=torch.float32)
        rows = Rows.start(nothing, valid, image_id.to(valid.device), prompt).take(entered)
        rows = replace(rows, column=KeptColumns.whole(rows.valid).source)
        self._pass = Pass({}, rows=rows, images=[image.tokens for image in images], types=types)

    def resume(self, left: Mapping[int, KeptColumns], following: torch.Tensor | None) -> None:
        """A decoding step begins: see `Pass`."""
        self._pass = Pass(dict(left), following)

    def finish(self) -> dict[int, KeptColumns]:
        """The call has ended: what each layer of the schedule has left of prompts; nothing after a decoding step."""
        now, self._pass = self._pass, None
        return {} if now is None or now.rows is None else now.left

    # The layers

    def _before_layer(self, depth: int) -> Callable[..., Any]:
        def hook(layer: Model, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            now = self._pass
            if now is None:
                return None
            named = "hidden_states" in kwargs
            hidden, rest = (kwargs["hidden_states"], args) if named else (args[0], args[1:])
            if now.rows is not None:
                now.rows = replace(now.rows, hidden=hidden).to(hidden.device)
                hidden = self._entered(now, now.rows, depth, layer, rest, kwargs)
            kwargs = self._fitting(now, depth, hidden, kwargs)
            return (rest, kwargs | {"hidden_states": hidden}) if named else ((hidden, *rest), kwargs)

        return hook

    def _entered(
        self, now: Pass, rows: Rows, depth: int, layer: Model, args: tuple, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """A layer's input ``rows``, without what is dropped there."""
        hidden = rows.hidden
        if depth == 0:
            if "rater_attention" in self.pruner.needs:
                now.raters = choose_raters(rows, self.pruner)
            if "text_attention" in self.pruner.needs:
                refuse_images_without_text(rows, self.pruner)
        if depth not in self.schedule:
            return hidden
        if self.pruner.needs & AHEAD:
            fitting = self._fitting(now, depth, hidden, kwargs) | {"hidden_states": hidden}
            now.seen |= self._look_ahead(rows, layer, args, fitting)
        if self.pruner.needs & STATES:
            now.seen["states"] = self.decoder.norm(hidden.detach()).to(hidden.device)
        now.rows = drop_image_tokens(rows, now.images, self.pruner, self.schedule[depth], now.seen)
        now.left[depth], now.seen = KeptColumns(now.rows.column, now.rows.valid), {}
        return now.rows.hidden

    def _fitting(self, now: Pass, depth: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's other arguments, for what is left at its input."""
        dropped_at = max((layer for layer in now.left if layer <= depth), default=None)
        if dropped_at is None:
            return kwargs
        columns, fitting = now.left[dropped_at].to(hidden.device), dict(kwargs)
        if now.rows is not None:
            if kwargs.get("position_embeddings") is not None:
                fitting["position_embeddings"] = tuple(
                    kept_rotary(columns, part) for part in kwargs["position_embeddings"]
                )
            if kwargs.get("position_ids") is not None:
                fitting["position_ids"] = kept_positions(columns, kwargs["position_ids"])
        key = dropped_at, self.kinds[depth]
        if key not in now.masks:
            make = self._step_mask if now.rows is None else self._prefill_mask
            now.masks[key] = make(now, depth, hidden, columns, cache_of(kwargs))
        return fitting | {"attention_mask": now.masks[key]}

    def _prefill_mask(self, now: Pass, depth: int, hidden: torch.Tensor, columns: KeptColumns, cache: Any) -> Any:
        """As the model itself makes it, on a prompt of the kept columns."""
        make = getattr(self.model, "create_masks_for_generate", create_masks_for_generate)
        masks = make(
            config=self.model.config,
            inputs_embeds=hidden,
            attention_mask=columns.present.long(),
            position_ids=None,
            is_first_iteration=True,
            **{CACHE: None},
            **{name: columns.take(values, 0) for name, values in now.types.items()},
        )
        return masks[self.kinds[depth]] if isinstance(masks, dict) else masks

    def _step_mask(self, now: Pass, depth: int, hidden: torch.Tensor, columns: KeptColumns, cache: Any) -> Any:
        kind = self.kinds[depth]
        if kind in WITHOUT_KEYS:
            return None  # what is generated is never padding
        following = now.following
        if following is None:
            n = cache.get_seq_length(depth) + hidden.shape[1] - columns.present.shape[1]
            following = columns.present.new_ones(len(columns.present), n)
        if kind is None:
            kind = "sliding_attention" if getattr(self.decoder.config, "sliding_window", None) else "full_attention"
        return LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind](
            config=self.decoder.config,
            inputs_embeds=hidden,
            attention_mask=torch.cat([columns.present, following.bool()], dim=1).to(hidden.device).long(),
            layer_idx=depth,
            **{CACHE: cache},
        )

    def _deepstack(self, marks: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the encoder adds after a layer, to the image tokens that are still there."""
        if self._pass is None or not self._pass.left:
            return marks, features
        columns = self._pass.left[max(self._pass.left)].to(marks.device)
        number = (marks.flatten().cumsum(0) - 1).view_as(marks)
        kept = columns.take(marks, False)
        return kept, features[columns.take(number, 0)[kept]]

    # Looking at attention

    def _look(self, call: Call) -> None:
        now = self._pass
        if now is not None and now.rows is not None:
            now.seen = decoder_signals(self.pruner.needs & BEFORE, call, now.rows, now.raters)

    def _look_ahead(self, rows: Rows, layer: Model, args: tuple, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Run a layer on what is there before the drop, up to its attention and without a cache."""
        seen: dict[str, torch.Tensor] = {}

        def look(call: Call) -> None:
            seen.update(decoder_signals(self.pruner.needs & AHEAD, call, rows, None))
            raise _Seen

        watch = Watch(layer.self_attn, look)
        try:
            layer.forward(*args, **{name: value for name, value in kwargs.items() if name not in CACHE_NAMES})
        except _Seen:
            pass
        finally:
            watch.remove()
        return seen


def _checkpoints_activations(model: Model) -> bool:
    # Older transformers know the second name alone, version 6 the first.
    known = getattr(model, "is_activation_checkpointing", None)
    return model.is_gradient_checkpointing if known is None else known


class _Seen(Exception):
    """Ends a layer that is only looked at."""


@torch.no_grad()
def decoder_signals(
    needs: frozenset[str], call: Call, rows: Rows, raters: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What a method asks of a decoder layer's attention: name -> (B, T, ...), see `Signals`; no texts' of their own.

    ``raters``, (B, T), bool, covers the whole prompts.
    """

    def ask(own: slice, queries: torch.Tensor) -> torch.Tensor:
        return call.rows(own).weights(queries, rows.valid[own])

    def strongest(queries: torch.Tensor) -> torch.Tensor:
        # Rows of padding see nothing.
        return ask(slice(None), queries.expand(batch, -1)).nan_to_num().amax(dim=1)

    seen = attention_of_queries(needs, rows, raters, ask)
    if needs & {"visual_attention", "text_attention"}:
        batch, heads = call.query.shape[:2]
        received = received_by_images(strongest, rows.image_id, rows.text, heads)
        seen |= dict(zip(("visual_attention", "text_attention"), received, strict=True))
    if needs & {"keys", "text_keys"}:
        seen["keys"] = call.key.transpose(1, 2).flatten(2)
    return seen
