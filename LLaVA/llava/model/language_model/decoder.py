"""The decoder loop that can drop visual tokens at a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava.model.language_model.kv_cache import CACHE, Filling, cache_among
from llava.model.language_model.observed_attention import asked_of, keys_of, observed_attention
from llava.model.offload import execution_device
from llava.model.prefill import Prefill
from llava.pruning.attention import attention_of_queries
from llava.pruning.base import Pruner
from llava.pruning.rows import KeptColumns, Rows, choose_raters, drop_image_tokens, refuse_images_without_text
from llava.pruning.tokens import ImageTokens

Mixin: Any = object
"""See `llava.model.llava_arch.Mixin`."""


class DroppingDecoder(Mixin):
    """Mixed in before a decoder stack: where a `Prefill`'s method drops inside, deeper layers see fewer tokens.

    In prefill and in every decoding step each layer sees what the drops up to it left, with its own mask and its own
    length of the KV cache. Where nothing is dropped the stack's own forward runs. Either way the cache knows its
    padding and its positions (see `Filling`): what goes on with it may come without a mask and without positions.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prefill: Prefill | None = None,
        prompt_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Parameters
        ----------
        attention_mask : Tensor, optional
            See `Filling.new_content`.
        position_ids : Tensor (B or 1, T), optional
            Of the new tokens.
        past_key_values : Cache, optional
            ``cache`` is another name for it.
        prefill : Prefill, optional
            What is known of the embedded prompts; gets what the last drop left of them.
        prompt_mask : Tensor (B, T), optional
            False at what is to be predicted, which must not choose tokens.

        Raises
        ------
        NotImplementedError
            For attention maps, a sliding window, or images that follow a filled cache, while tokens are dropped
            inside the decoder.
        ValueError
            If an image has no text after it, and the method ranks by the text's attention.
        """
        cache = cache_among(past_key_values, kwargs)
        call = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "use_cache": use_cache, CACHE: cache} | kwargs
        noted = getattr(cache, "filling", None)
        prepared = attention_mask is not None and getattr(attention_mask, "ndim", None) != 2
        if inputs_embeds is None and (noted is None or (prepared and not noted.left)):
            # Ids of text alone, or a step in a static cache, which a look at the cache's length would interrupt.
            return super().forward(attention_mask=attention_mask, position_ids=position_ids, **call)
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        n = tokens.shape[1]
        before = Filling.of(cache, tokens.device)
        new = before.new_content(attention_mask, n)
        dropping = prefill if prefill is not None and prefill.active.inside_decoder else None
        if position_ids is None:
            # A first prompt's padding counts, as in transformers, but where methods may rank by turned keys.
            position_ids = before.new_positions(n, None if before.length == 0 and dropping is None else new)
        after = before.grown(n, new, position_ids)
        if dropping is not None and before.length and dropping.images:
            raise NotImplementedError("LAYER_INDEX > 0 does not take images after a filled KV cache")
        if before.left or (dropping is not None and not before.length):
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            dropping = None if before.left else dropping
            rows = None if dropping is None else _start(embeds, new, position_ids, dropping, prompt_mask)
            return self._forward_in_stages(embeds, rows, position_ids, cache, after, use_cache, dropping, **kwargs)
        if before.length and not prepared:
            attention_mask = after.mask
        outputs = super().forward(attention_mask=attention_mask, position_ids=position_ids, **call)
        cache = getattr(outputs, CACHE, None) if cache is None else cache
        if cache is not None:
            cache.filling = after
        return outputs

    def _forward_in_stages(
        self,
        hidden: torch.Tensor,
        rows: Rows | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        filling: Filling,
        use_cache: bool | None,
        prefill: Prefill | None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The layers one by one, where tokens are dropped at some of them now, or were when the cache was filled.

        ``rows`` are the prompts, from which tokens are to be dropped, or None where the cache holds them already;
        ``filling`` is what the cache will hold.
        """
        if kwargs.pop("output_attentions", None):
            raise NotImplementedError("output_attentions is not available while a layer drops visual tokens")
        if getattr(self.config, "sliding_window", None) is not None:
            raise NotImplementedError("LAYER_INDEX > 0 does not work with sliding-window attention")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        collect = kwargs.pop("output_hidden_states", None) or self.config.output_hidden_states
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        position_ids = position_ids.expand(len(hidden), -1)
        left, raters = dict(filling.left), None
        stages: dict[int, Any] = left
        compact, states = filling.compact, list[torch.Tensor]()
        if rows is not None:
            assert prefill is not None
            active, images = prefill.active.inside, prefill.images
            pruner: Any = active.pruner
            stages, compact = dict(active.schedule), active.compact
            totals = [len(image) for image in images]
            if "rater_attention" in pruner.needs:
                raters = choose_raters(rows, pruner)
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        mask = self._causal_mask(hidden, filling.mask, cache, 0)
        for depth, layer in enumerate(self.layers):
            if depth in stages:
                hidden = hidden.to(execution_device(layer))
                if rows is not None:
                    if not pruner.after_attention:
                        rows = replace(rows, hidden=hidden).to(hidden.device)
                        before = None if depth == 0 else (self.layers[depth - 1], states[-1])
                        seen = _signals(pruner.needs, rows, before, layer, rotary, raters)
                        if pruner.needs & {"states", "text_states"}:
                            seen["states"] = self.norm(hidden.detach()).to(hidden.device)
                        rows = drop_image_tokens(rows, images, pruner, stages[depth], seen)
                        hidden = rows.hidden
                    left[depth] = rows.valid
                    position_ids = rows.side["position_ids"]
                if compact:
                    counted = (left[depth].long().cumsum(dim=1) - 1).clamp_min(0)
                    position_ids = counted[:, -hidden.shape[1] :]
                rotary = self.rotary_emb(hidden, position_ids=position_ids)
                mask = self._causal_mask(hidden, left[depth], cache, depth)
            states.append(hidden)
            if rows is not None and active.drops_after_attention(depth, totals):
                rows = replace(rows, hidden=hidden).to(execution_device(layer))
                rows = _layer_that_drops(layer, rows, rotary, cache, pruner, images, stages[depth + 1])
                hidden = rows.hidden
                continue
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        if prefill is not None and rows is not None:
            prefill.left = KeptColumns(rows.column, rows.valid)
            if len(self.layers) in stages:
                left[len(self.layers)] = rows.valid
            cached = left[0].shape[1] if 0 in left else filling.length
            filling = replace(filling, left=left, compact=compact, cached=cached)
        if cache is not None:
            cache.filling = filling
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*states, hidden) if collect else None,
            **{CACHE: cache if use_cache else None},
        )

    def _causal_mask(self, hidden: torch.Tensor, content: torch.Tensor | None, cache: Cache | None, depth: int):
        """The mask of a layer's attention over what its cache holds and these tokens, of which some is padding."""
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=content,
            **{CACHE: None if cache is None else _LengthOfLayer(cache, depth)},
        )


def _start(
    embeds: torch.Tensor,
    content: torch.Tensor | None,
    position_ids: torch.Tensor,
    prefill: Prefill,
    prompt: torch.Tensor | None,
) -> Rows:
    """The embedded prompts (B, T, D) as rows of which nothing is dropped yet."""
    image_id = prefill.image_id_of(len(embeds)).to(embeds.device)
    valid = torch.ones_like(image_id, dtype=torch.bool) if content is None else content
    positions = position_ids.expand(len(embeds), -1)
    rows = Rows.start(embeds, valid, image_id, prompt, prefill.kept, position_ids=positions)
    pruner = prefill.active.inside.pruner
    if pruner is not None and "text_attention" in pruner.needs:
        refuse_images_without_text(rows, pruner)
    return rows


def _layer_that_drops(
    layer: Any,
    rows: Rows,
    rotary: tuple[torch.Tensor, torch.Tensor],
    cache: Cache | None,
    pruner: Pruner,
    images: Sequence[ImageTokens],
    fraction: float,
) -> Rows:
    """One layer in which tokens leave between the attention and its output projection.

    All rows give keys and values; projection and feed-forward block see what is kept.
    """
    cos, sin = (part.to(rows.hidden.device) for part in rotary)
    heads, visual_attention, text_attention = observed_attention(
        layer.self_attn, layer.input_layernorm(rows.hidden), (cos, sin), rows.valid, rows.image_id, rows.text, cache
    )
    observed = {"visual_attention": visual_attention, "text_attention": text_attention}
    seen = {name: values for name, values in observed.items() if name in pruner.needs}
    rows = replace(rows, side={**rows.side, "heads": heads})
    rows = drop_image_tokens(rows, images, pruner, fraction, seen)
    side = dict(rows.side)
    hidden = rows.hidden + layer.self_attn.o_proj(side.pop("heads"))
    return replace(rows, hidden=hidden + layer.mlp(layer.post_attention_layernorm(hidden)), side=side)


def _signals(
    needs: frozenset[str], rows: Rows, before: tuple[Any, torch.Tensor] | None, layer: Any, rotary: Any, raters: Any
) -> dict[str, torch.Tensor]:
    """What a method needs of these two layers, at the rows' present places: name -> (B, T, ...)."""
    ahead = frozenset({"next_attention"})
    seen = attention_of_queries(needs & ahead, rows, None, asked_of(layer, rows.hidden, rotary, rows.valid))
    if before is not None:
        seen |= attention_of_queries(needs - ahead, rows, raters, asked_of(*before, rotary, rows.valid))
        if needs & {"keys", "text_keys"}:
            seen["keys"] = keys_of(*before, rotary)
    return seen


class _LengthOfLayer:
    """A cache as seen from one layer; masks are sized by layer 0 otherwise, which holds more entries."""

    def __init__(self, cache: Cache, layer: int):
        self._cache, self._layer = cache, layer
        self.is_compileable = cache.is_compileable

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._cache.get_seq_length(self._layer)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._cache.get_query_offset(self._layer)

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length, self._layer)
