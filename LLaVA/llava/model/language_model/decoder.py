"""The decoder loop that can drop visual tokens at a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava.model.language_model.kv_cache import CACHE, Filling, cache_among
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
from llava.model.offload import execution_device
from llava.model.visual_sequence import ImageTokens, PromptFacts
from llava.pruning.base import gather_tokens


class DroppingDecoder:
    """Mixed in before a decoder stack: with ``layer_drop`` set, layers from its stages on see fewer tokens.

    In prefill and in every decoding step each layer sees what the stages up to it left, with its own mask and its own
    length of the KV cache. Where nothing is dropped the stack's own forward runs. Either way the cache knows its
    padding and its positions (see `Filling`): what goes on with it may come without a mask and without positions.

    Attributes
    ----------
    kept_prefix : KeptPrefix or None
        What the latest prefill left after its last stage; None where it dropped nothing.
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
        attention_mask : Tensor, optional
            See `Filling.new_content`.
        position_ids : Tensor (B or 1, T), optional
            Of the new tokens.
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
            If an image has no text after it, and the method ranks by the text's attention.
        """
        cache = cache_among(past_key_values, kwargs)
        call = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "use_cache": use_cache, CACHE: cache} | kwargs
        noted = getattr(cache, "filling", None)
        prepared = attention_mask is not None and getattr(attention_mask, "ndim", None) != 2
        if inputs_embeds is None and (noted is None or (prepared and not noted.left)):
            # Ids of text alone, or a step in a static cache, which a look at the cache's length would interrupt.
            return super().forward(attention_mask=attention_mask, position_ids=position_ids, **call)
        if inputs_embeds is not None:
            self.kept_prefix = None
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        n = tokens.shape[1]
        before = Filling.of(cache, tokens.device)
        new = before.new_content(attention_mask, n)
        if position_ids is None:
            # A first prompt's padding counts, as in transformers.
            position_ids = before.new_positions(n, new if before.length else None)
        after = before.grown(n, new, position_ids)
        drops = self.layer_drop is not None and visual_index is not None
        if drops and before.length and visual_facts:
            raise NotImplementedError("LAYER_INDEX > 0 does not take images after a filled KV cache")
        if before.left or (drops and not before.length):
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            rows = None if before.left else self._start(embeds, new, visual_index, prompt_mask)
            return self._forward_in_stages(embeds, rows, position_ids, cache, after, use_cache, visual_facts, **kwargs)
        if before.length and not prepared:
            attention_mask = after.mask
        outputs = super().forward(attention_mask=attention_mask, position_ids=position_ids, **call)
        cache = getattr(outputs, CACHE, None) if cache is None else cache
        if cache is not None:
            cache.filling = after
        return outputs

    def _start(
        self, embeds: torch.Tensor, content: torch.Tensor | None, index: torch.Tensor, prompt: torch.Tensor | None
    ) -> Sequences:
        """The embedded prompts (B, T, D) as rows of which nothing is dropped yet."""
        valid = torch.ones_like(index, dtype=torch.bool) if content is None else content
        rows = Sequences.start(embeds, valid, index, prompt)
        if "text_attention" in self.layer_drop.pruner.needs:
            refuse_images_without_text(rows, self.layer_drop.pruner)
        return rows

    def _forward_in_stages(
        self,
        hidden: torch.Tensor,
        rows: Sequences | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        filling: Filling,
        use_cache: bool | None,
        facts: Sequence[tuple[ImageTokens, PromptFacts]],
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The layers one by one, where tokens are dropped at some of them now, or were when the cache was filled.

        Parameters
        ----------
        rows : Sequences or None
            The prompts, from which tokens are to be dropped; None where the cache holds them already.
        filling : Filling
            What the cache will hold.
        """
        if kwargs.pop("output_attentions", None):
            raise NotImplementedError("output_attentions is not available while a layer drops visual tokens")
        if getattr(self.config, "sliding_window", None) is not None:
            raise NotImplementedError("LAYER_INDEX > 0 does not work with sliding-window attention")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        collect = kwargs.pop("output_hidden_states", None) or self.config.output_hidden_states
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        position_ids = prompt_positions = position_ids.expand(len(hidden), -1)
        drop, left = self.layer_drop, dict(filling.left)
        stages = left if rows is None else dict(drop.stages)
        compact = filling.compact if rows is None else drop.compact
        raters = None
        if rows is not None and "rater_attention" in drop.pruner.needs:
            raters = choose_raters(rows, drop.pruner)
        totals = [len(image.features) for image, _ in facts]
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        mask = self._causal_mask(hidden, filling.mask, cache, 0)
        states = []
        for depth, layer in enumerate(self.layers):
            if depth in stages:
                hidden = hidden.to(execution_device(layer))
                if rows is not None:
                    if not drop.pruner.after_attention:
                        rows = replace(rows, hidden=hidden).to(hidden.device)
                        before = None if depth == 0 else (self.layers[depth - 1], states[-1])
                        seen = self._observe(rows, before, layer, rotary, raters)
                        rows = drop_visual_tokens(rows, facts, drop.pruner, stages[depth], seen)
                        hidden = rows.hidden
                    left[depth] = rows.valid
                    position_ids = prompt_positions.to(rows.origin.device).gather(1, rows.origin)
                if compact:
                    counted = (left[depth].long().cumsum(dim=1) - 1).clamp_min(0)
                    position_ids = counted[:, -hidden.shape[1] :]
                rotary = self.rotary_emb(hidden, position_ids=position_ids)
                mask = self._causal_mask(hidden, left[depth], cache, depth)
            states.append(hidden)
            if rows is not None and drop.drops_in(depth, totals):
                rows = replace(rows, hidden=hidden).to(execution_device(layer))
                rows = self._layer_that_drops(layer, rows, rotary, cache, facts, stages[depth + 1])
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
        if rows is not None:
            self.kept_prefix = KeptPrefix(rows.origin, rows.valid)
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
        rotary = tuple(part.to(text.device) for part in rotary)
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

        def look(attention, layer: torch.nn.Module, hidden: torch.Tensor, asking: torch.Tensor) -> torch.Tensor:
            """Where the layer computes, which may be another device than the rows'."""
            device = execution_device(layer)
            turned = tuple(part.to(device) for part in rotary)
            found = attention(layer, hidden.to(device), turned, rows.valid.to(device), asking.to(device))
            return found.to(rows.hidden.device)

        if "next_attention" in needs:
            seen["next_attention"] = look(last_token_attention, layer, rows.hidden, rows.prompt)
        if before is None:
            return seen
        if "last_attention" in needs:
            seen["last_attention"] = look(last_token_attention, *before, rows.prompt)
        if "rater_attention" in needs:
            present = raters.to(rows.origin.device).gather(1, rows.origin) & rows.valid
            seen["rater_attention"] = look(rater_attention, *before, present)
        return seen

    def _causal_mask(self, hidden: torch.Tensor, content: torch.Tensor | None, cache: Cache | None, depth: int):
        """The mask of a layer's attention over what its cache holds and these tokens, of which some is padding."""
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=content,
            **{CACHE: None if cache is None else _LengthOfLayer(cache, depth)},
        )


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
