"""The decoder loop that can drop visual tokens at a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava.model.language_model.kv_cache import CACHE, cache_among
from llava.model.language_model.observed_attention import last_token_attention, observed_attention, rater_attention
from llava.model.language_model.visual_drop import (
    TEXT,
    KeptPrefix,
    LayerDrop,
    Sequences,
    choose_raters,
    drop_visual_tokens,
    refuse_images_without_text,
)
from llava.model.visual_sequence import ImageTokens, PromptFacts
from llava.pruning.base import gather_tokens


class DroppingDecoder:
    """Mixed in before a decoder stack: with ``layer_drop`` set, layers from its stages on see fewer tokens.

    In prefill and in every decoding step each layer sees what the stages up to it left, with its own mask and its own
    length of the KV cache. Without ``layer_drop`` the stack's own forward runs, untouched.

    Attributes
    ----------
    kept_prefix : KeptPrefix or None
        What the latest prefill left behind its last stage.
    """

    layer_drop: LayerDrop | None = None
    kept_prefix: KeptPrefix | None = None

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        visual_index: torch.LongTensor | None = None,
        visual_facts: Sequence[tuple[ImageTokens, PromptFacts]] = (),
        prompt_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Parameters
        ----------
        past_key_values : Cache, optional
            ``cache`` is another name for it.
        visual_index : Tensor (B, T), int64, optional
            Number of the image that each embedded position belongs to, `TEXT` for text and padding.
        visual_facts : sequence
            What is known of each image, by its number.
        prompt_mask : Tensor (B, T), optional
            False at what is to be predicted, which must not choose tokens.

        Raises
        ------
        NotImplementedError
            For attention maps, a sliding window, or images that follow a filled cache, while tokens are dropped
            inside the decoder.
        ValueError
            If an image has no text behind it, and the method ranks by the text's attention.
        """
        past_key_values = cache_among(past_key_values, kwargs)
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        prefixes = getattr(past_key_values, "kept_prefixes", None) if cached else None
        if self.layer_drop is None or (visual_index is None and prefixes is None):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{CACHE: past_key_values},
                **kwargs,
            )
        self._refuse_what_cannot_be_dropped(visual_index, cached, kwargs)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        collect = kwargs.pop("output_hidden_states", None) or self.config.output_hidden_states
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = torch.arange(cached, cached + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
        )
        rows = raters = None
        if prefixes is None:
            valid = attention_mask.bool() if attention_mask is not None else visual_index.new_ones((), dtype=torch.bool)
            rows = Sequences.start(inputs_embeds, valid.expand(visual_index.shape), visual_index, prompt_mask)
            if "rater_attention" in self.layer_drop.pruner.needs:
                raters = choose_raters(rows, self.layer_drop.pruner)
            if "text_attention" in self.layer_drop.pruner.needs:
                refuse_images_without_text(rows, self.layer_drop.pruner)

        hidden = inputs_embeds
        prompt_positions = position_ids
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        drop, stages = self.layer_drop, dict(self.layer_drop.stages)
        left = {} if prefixes is None else prefixes
        totals = [len(image.features) for image, _ in visual_facts]
        states = []
        for depth, layer in enumerate(self.layers):
            if depth in stages:
                if rows is not None:
                    if not drop.pruner.after_attention:
                        rows = replace(rows, hidden=hidden)
                        before = None if depth == 0 else (self.layers[depth - 1], states[-1])
                        seen = self._observe(rows, before, layer, rotary, raters)
                        rows = drop_visual_tokens(rows, visual_facts, drop.pruner, stages[depth], seen)
                        hidden = rows.hidden
                    left[depth] = KeptPrefix(rows.origin, rows.valid)
                    position_ids = prompt_positions.gather(1, rows.origin)
                if drop.compact:
                    position_ids = self._compact_positions(left[depth], hidden, depth, past_key_values)
                rotary = self.rotary_emb(hidden, position_ids=position_ids)
                mask = self._mask_after_drop(hidden, left[depth], position_ids, past_key_values, depth)
            states.append(hidden)
            if rows is not None and drop.drops_in(depth, totals):
                rows = replace(rows, hidden=hidden)
                rows = self._layer_that_drops(layer, rows, rotary, past_key_values, visual_facts, stages[depth + 1])
                hidden = rows.hidden
                continue
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: past_key_values},
                **kwargs,
            )
        if rows is not None and len(self.layers) in stages:
            left[len(self.layers)] = KeptPrefix(rows.origin, rows.valid)
        self.kept_prefix = left[max(left)]
        if past_key_values is not None:
            past_key_values.kept_prefixes = left
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*states, hidden) if collect else None,
            **{CACHE: past_key_values if use_cache else None},
        )

    def _layer_that_drops(
        self,
        layer: torch.nn.Module,
        rows: Sequences,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        facts: Sequence[tuple[ImageTokens, PromptFacts]],
        fraction: float,
    ) -> Sequences:
        """One layer in which tokens leave between the attention and its output projection.

        All rows give keys and values; projection and feed-forward block see what is kept.
        """
        text = rows.prompt & (rows.index == TEXT)
        heads, visual_attention, text_attention = observed_attention(
            layer.self_attn, layer.input_layernorm(rows.hidden), rotary, rows.valid, rows.index, text, cache
        )
        observed = {"visual_attention": visual_attention, "text_attention": text_attention}
        seen = {name: value for name, value in observed.items() if name in self.layer_drop.pruner.needs}
        rows = drop_visual_tokens(rows, facts, self.layer_drop.pruner, fraction, seen)
        hidden = rows.hidden + layer.self_attn.o_proj(gather_tokens(heads, rows.place))
        return replace(rows, hidden=hidden + layer.mlp(layer.post_attention_layernorm(hidden)))

    def _observe(self, rows: Sequences, before, layer, rotary, raters) -> dict[str, torch.Tensor]:
        """The attention that the pruner asks for, at the rows' present places: name -> (B, T, ...)."""
        needs, seen = self.layer_drop.pruner.needs, {}
        if "next_attention" in needs:
            seen["next_attention"] = last_token_attention(layer, rows.hidden, rotary, rows.valid, rows.prompt)
        if before is None:
            return seen
        if "last_attention" in needs:
            seen["last_attention"] = last_token_attention(*before, rotary, rows.valid, rows.prompt)
        if "rater_attention" in needs:
            present = raters.gather(1, rows.origin) & rows.valid
            seen["rater_attention"] = rater_attention(*before, rotary, rows.valid, present)
        return seen

    def _compact_positions(self, prefix: KeptPrefix, hidden, depth: int, cache: Cache | None) -> torch.Tensor:
        """Rotary positions without gaps: of the kept prompt, or of what is generated behind it."""
        cached = cache.get_seq_length(depth) if cache is not None else 0
        if not cached:
            return prefix.compact_positions()
        generated = cached - prefix.mask.shape[1] + torch.arange(hidden.shape[1], device=hidden.device)
        return prefix.mask.sum(dim=1, keepdim=True) + generated

    def _mask_after_drop(self, hidden, prefix: KeptPrefix, position_ids, cache: Cache | None, depth: int):
        """The attention mask of the layers from a stage on: kept prompt, then everything generated since."""
        cached = cache.get_seq_length(depth) if cache is not None else 0
        generated = cached + hidden.shape[1] - prefix.mask.shape[1]
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=torch.cat([prefix.mask, prefix.mask.new_ones(len(prefix.mask), generated)], dim=1),
            position_ids=position_ids,
            **{CACHE: None if cache is None else _LengthOfLayer(cache, depth)},
        )

    def _refuse_what_cannot_be_dropped(self, visual_index: torch.Tensor | None, cached: int, kwargs: dict) -> None:
        if kwargs.get("output_attentions"):
            raise NotImplementedError("output_attentions is not available while a layer drops visual tokens")
        if getattr(self.config, "sliding_window", None) is not None:
            raise NotImplementedError("LAYER_INDEX > 0 does not work with sliding-window attention")
        if visual_index is not None and cached:
            raise NotImplementedError("LAYER_INDEX > 0 does not take images after a filled KV cache")


class _LengthOfLayer:
    """A cache as seen from one layer; masks are sized by layer 0 otherwise, which holds more entries."""

    is_compileable = False

    def __init__(self, cache: Cache, layer: int):
        self._cache, self._layer = cache, layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._cache.get_seq_length(self._layer)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._cache.get_query_offset(self._layer)

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length, self._layer)
