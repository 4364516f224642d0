"""The decoder loop that can drop visual tokens at a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.pruning.base import Pruner, VisualTokens, kept_count

TEXT = -1
"""What `visual_index` holds where no image stands."""


@dataclass(frozen=True)
class LayerDrop:
    """Drop visual tokens at the input of decoder layer ``layer``.

    Attributes
    ----------
    pruner : Pruner
        Sees the hidden states of each image's visual tokens at that layer.
    ratio : float
        Kept ratio.
    layer : int
        0-based; layers below it see every token.
    """

    pruner: Pruner
    ratio: float
    layer: int


@dataclass(frozen=True)
class KeptPrefix:
    """What a prefill left of the prompts from the dropping layer on; later decoding steps need it.

    Attributes
    ----------
    positions : Tensor (B, T'), int64
        Index into the embedded prompt of every kept token, ascending in each row, padding first.
    mask : Tensor (B, T'), bool
        False where a row is padded because another one kept more.
    """

    positions: torch.Tensor
    mask: torch.Tensor


def drop_visual_tokens(
    hidden: torch.Tensor,
    visual_index: torch.Tensor,
    image_keys: tuple[int, ...] | None,
    valid: torch.Tensor,
    drop: LayerDrop,
    last_attention: torch.Tensor | None = None,
) -> tuple[torch.Tensor, KeptPrefix]:
    """Apply a pruner to every image of every row, and close the gaps.

    Parameters
    ----------
    hidden : Tensor (B, T, D)
    visual_index : Tensor (B, T), int64
        Number of the image a position belongs to, `TEXT` for text and padding.
    image_keys : tuple of int, or None
        A content digest an image, for methods that ask for it.
    valid : Tensor (B, T), bool
        False at padding.
    drop : LayerDrop
    last_attention : Tensor (B, H, T), optional
        From `last_token_attention`, for methods that ask for it.

    Returns
    -------
    hidden : Tensor (B, T', D)
        Rows are padded on the left.
    prefix : KeptPrefix
    """
    keep = valid.clone()
    merged = hidden.clone()
    for n, members in _spans_by_length(visual_index).items():
        rows = torch.tensor([row for row, _, _ in members], device=hidden.device)
        places = torch.stack([place for _, _, place in members])  # (M, n)
        tokens = VisualTokens(
            features=hidden[rows[:, None], places],
            k=kept_count(n, drop.ratio),
            image_keys=image_keys and tuple(image_keys[image] for _, image, _ in members),
            last_attention=None if last_attention is None else _at_places(last_attention, rows, places),
        )
        kept = drop.pruner.reduce(tokens)
        kept_places = places.gather(1, kept.indices)
        keep[rows[:, None], places] = False
        keep[rows[:, None], kept_places] = True
        merged[rows[:, None], kept_places] = kept.features
    longest = int(keep.sum(dim=1).max())
    positions = keep.int().argsort(dim=1, stable=True)[:, -longest:]
    gathered = merged.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return gathered, KeptPrefix(positions, keep.gather(1, positions))


def _at_places(attention: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B, H, T) read at ``places`` (M, n) of ``rows`` (M,): (M, H, n)."""
    picked = attention[rows]
    return picked.gather(2, places.unsqueeze(1).expand(-1, picked.shape[1], -1))


def last_token_attention(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    valid: torch.Tensor,
) -> torch.Tensor:
    """Attention of each row's last token to all positions in one decoder layer, computed for that token alone.

    Parameters
    ----------
    layer : decoder layer of Llama or Mistral
    hidden : Tensor (B, T, D)
        The layer's input.
    rotary : (cos, sin), each (1 or B, T, head width)
    valid : Tensor (B, T), bool
        False at padding.

    Returns
    -------
    Tensor (B, H, T), float32
        Rows of the softmax; 0 at padding.
    """
    attention = layer.self_attn
    batch, length, _ = hidden.shape
    rows = torch.arange(batch, device=hidden.device)
    last = length - 1 - valid.flip(1).int().argmax(dim=1)  # (B,)
    normed = layer.input_layernorm(hidden)
    keys = attention.k_proj(normed).view(batch, length, -1, attention.head_dim).transpose(1, 2)
    query = attention.q_proj(normed[rows, last]).view(batch, 1, -1, attention.head_dim).transpose(1, 2)
    cos, sin = (part.expand(batch, -1, -1) for part in rotary)
    # Both arguments are rotated by the same angles: the query's position first, then the keys'.
    query, _ = apply_rotary_pos_emb(query, query, cos[rows, last].unsqueeze(1), sin[rows, last].unsqueeze(1))
    keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)  # (B, H, T, head width)
    logits = (query @ keys.mT).squeeze(2).float() * attention.scaling
    return logits.masked_fill(~valid.unsqueeze(1), -torch.inf).softmax(dim=-1)


def _spans_by_length(index: torch.Tensor) -> dict[int, list[tuple[int, int, torch.Tensor]]]:
    """Length -> (row, image, places) of the images of that length."""
    spans: dict[int, list[tuple[int, int, torch.Tensor]]] = {}
    for row, images in enumerate(index):
        for image in images.unique().tolist():
            if image != TEXT:
                places = (images == image).nonzero().flatten()
                spans.setdefault(len(places), []).append((row, image, places))
    return spans


class DroppingDecoder:
    """Mixed in before a decoder stack: with ``layer_drop`` set, layers from ``layer_drop.layer`` on see fewer tokens.

    In prefill and in every decoding step, layers below see the whole sequence and layers from there on the kept one,
    each with its own mask and its own length of the KV cache; rotary positions of what is kept stay what they were.
    Without ``layer_drop`` the stack's own forward runs, untouched.
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
        image_keys: tuple[int, ...] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the decoder; ``visual_index`` and ``image_keys`` are those of `drop_visual_tokens`.

        Raises
        ------
        NotImplementedError
            For attention maps, a sliding window, or images that follow a filled cache, while tokens are dropped
            inside the decoder.
        """
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        prefix = getattr(past_key_values, "kept_prefix", None) if cached else None
        if self.layer_drop is None or (visual_index is None and prefix is None):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
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
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden = inputs_embeds
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        states = []
        for depth, layer in enumerate(self.layers):
            if depth == self.layer_drop.layer:
                if prefix is None:
                    valid = (
                        torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
                        if attention_mask is None
                        else attention_mask.bool()
                    )
                    attention = None
                    if "last_attention" in self.layer_drop.pruner.needs:
                        attention = last_token_attention(self.layers[depth - 1], states[-1], rotary, valid)
                    hidden, prefix = drop_visual_tokens(
                        hidden, visual_index, image_keys, valid, self.layer_drop, attention
                    )
                    position_ids = position_ids.gather(1, prefix.positions)
                    rotary = self.rotary_emb(hidden, position_ids=position_ids)
                mask = self._mask_after_drop(hidden, prefix, position_ids, past_key_values)
            states.append(hidden)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        self.kept_prefix = prefix
        if past_key_values is not None:
            past_key_values.kept_prefix = prefix
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, hidden) if collect else None,
        )

    def _mask_after_drop(self, hidden, prefix: KeptPrefix, position_ids, past_key_values: Cache | None):
        """The attention mask of the layers from the drop on: kept prompt, then everything generated since."""
        layer = self.layer_drop.layer
        cached = past_key_values.get_seq_length(layer) if past_key_values is not None else 0
        generated = cached + hidden.shape[1] - prefix.mask.shape[1]
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=torch.cat([prefix.mask, prefix.mask.new_ones(len(prefix.mask), generated)], dim=1),
            past_key_values=None if past_key_values is None else _LengthOfLayer(past_key_values, layer),
            position_ids=position_ids,
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
