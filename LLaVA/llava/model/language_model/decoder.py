"""The decoder loop that can drop visual tokens at a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.model.language_model.observed_attention import observed_attention
from llava.model.visual_sequence import ImageTokens, PromptFacts, as_visual_tokens
from llava.pruning.base import Pruner, gather_tokens, kept_count

TEXT = -1
"""What `visual_index` holds where no image stands."""


@dataclass(frozen=True)
class LayerDrop:
    """Drop visual tokens at the inputs of decoder layers, or in the layers before, behind their attention.

    Attributes
    ----------
    pruner : Pruner
        Sees the hidden states of each image's visual tokens at the layer.
    stages : tuple of (layer, fraction)
        Ascending 0-based layers, and how much of an image's tokens is there from the layer's input on.

    Raises
    ------
    ValueError
        For a pruner that merges tokens behind the attention, whose output it does not see.
    """

    pruner: Pruner
    stages: tuple[tuple[int, float], ...]

    def __post_init__(self):
        if self.pruner.after_attention and self.pruner.merges:
            raise ValueError(f"{type(self.pruner).__name__} merges tokens: it cannot drop behind a layer's attention")

    def drops_in(self, layer: int, totals: Sequence[int]) -> bool:
        """Whether tokens leave behind this layer's attention, of images that had ``totals`` of them."""
        fractions = dict(self.stages)
        if not self.pruner.after_attention or layer + 1 not in fractions:
            return False
        present = min((fraction for stage, fraction in self.stages if stage <= layer), default=1.0)
        left = fractions[layer + 1]
        return self.pruner.varies or any(kept_count(n, left) < kept_count(n, present) for n in totals)

    @property
    def compact(self) -> bool:
        """Whether what is kept gets new rotary positions without gaps."""
        return self.pruner.position_ids == "compact"


@dataclass(frozen=True)
class KeptPrefix:
    """What a prefill left of the prompts from a dropping layer on; later decoding steps need it.

    Attributes
    ----------
    positions : Tensor (B, T'), int64
        Index into the embedded prompt of every kept token, ascending in each row (but for methods that reorder an
        image's tokens), padding first.
    mask : Tensor (B, T'), bool
        False where a row is padded because another one kept more.
    """

    positions: torch.Tensor
    mask: torch.Tensor

    def compact_positions(self) -> torch.Tensor:
        """Rotary positions (B, T') that count the kept tokens of each row."""
        return (self.mask.long().cumsum(dim=1) - 1).clamp_min(0)


@dataclass(frozen=True)
class Sequences:
    """A batch of rows on their way through the decoder, before or after drops.

    Attributes
    ----------
    hidden : Tensor (B, T, D)
    valid : Tensor (B, T), bool
        False at padding.
    index : Tensor (B, T), int64
        Number of the image a position belongs to, `TEXT` for text and padding.
    ordinal : Tensor (B, T), int64
        Which of its image's visual tokens a position holds, counted before any drop; `TEXT` for text and padding.
    origin : Tensor (B, T), int64
        Index into the embedded prompt.
    prompt : Tensor (B, T), bool
        False at padding and at what is to be predicted.
    place : Tensor (B, T), int64
        Where a position stood in the rows before the latest drop.
    """

    hidden: torch.Tensor
    valid: torch.Tensor
    index: torch.Tensor
    ordinal: torch.Tensor
    origin: torch.Tensor
    prompt: torch.Tensor
    place: torch.Tensor

    @classmethod
    def start(
        cls, hidden: torch.Tensor, valid: torch.Tensor, index: torch.Tensor, prompt: torch.Tensor | None
    ) -> Sequences:
        """The embedded prompts (B, T, D), nothing dropped yet."""
        origin = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        ordinal = torch.full_like(index, TEXT)
        for row, images in enumerate(index):
            for image in images.unique().tolist():
                if image != TEXT:
                    places = (images == image).nonzero().flatten()
                    ordinal[row, places] = torch.arange(len(places), device=index.device)
        prompt = valid if prompt is None else prompt.bool() & valid
        return cls(hidden, valid, index, ordinal, origin, prompt, place=origin)


def drop_visual_tokens(
    rows: Sequences,
    facts: Sequence[tuple[ImageTokens, PromptFacts]],
    pruner: Pruner,
    fraction: float,
    seen: Mapping[str, torch.Tensor],
) -> Sequences:
    """Apply a pruner to every image of every row, and close the gaps.

    Parameters
    ----------
    rows : Sequences
    facts : sequence
        What is known of each image, by its number.
    pruner : Pruner
    fraction : float
        Of an image's tokens before any drop, what is to be left; 0 drops them all.
    seen : mapping of str to Tensor (B, T, ...)
        Attention that the pruner asked for, by its field of `VisualTokens`.

    Returns
    -------
    Sequences
        Padded on the left.
    """
    hidden = rows.hidden
    keep = rows.valid.clone()
    # What each kept place will hold: usually its own token, another one where a method reorders.
    source = torch.arange(hidden.shape[1], device=hidden.device).repeat(len(hidden), 1)
    merged = hidden.clone() if pruner.merges else hidden
    for members in _spans(rows.index, facts, alone=pruner.varies):
        row = torch.tensor([row for row, _, _ in members], device=hidden.device)[:, None]
        places = torch.stack([place for _, _, place in members])  # (M, n)
        keep[row, places] = False
        if fraction == 0:
            continue
        images = [image for _, image, _ in members]
        total = len(facts[images[0]][0].features)
        tokens = as_visual_tokens(
            hidden[row, places],
            # Rounded as before the decoder: a fraction of what the image had, at most what is left of it.
            min(places.shape[1], kept_count(total, fraction)),
            [facts[image][0] for image in images],
            [facts[image][1] for image in images],
            alive=rows.ordinal[row, places] if total != places.shape[1] else None,
            **{name: attention[row, places] for name, attention in seen.items()},
        )
        kept = pruner.reduce(tokens)
        slots = places.gather(1, kept.indices.sort(dim=-1).values)
        keep[row, slots] = True
        source[row, slots] = places.gather(1, kept.indices)
        if pruner.merges:
            merged[row, slots] = kept.features
    longest = int(keep.sum(dim=1).max())
    order = keep.int().argsort(dim=1, stable=True)[:, -longest:]
    source = source.gather(1, order)
    taken = order if pruner.merges else source
    return Sequences(
        hidden=merged.gather(1, taken.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])),
        valid=keep.gather(1, order),
        index=rows.index.gather(1, source),
        ordinal=rows.ordinal.gather(1, source),
        origin=rows.origin.gather(1, source),
        prompt=rows.prompt.gather(1, source) & keep.gather(1, order),
        place=source,
    )


def query_attention(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    valid: torch.Tensor,
    queries: torch.Tensor,
) -> torch.Tensor:
    """Attention of a few tokens to all positions in one decoder layer, computed for those tokens alone.

    Parameters
    ----------
    layer : decoder layer of Llama or Mistral
    hidden : Tensor (B, T, D)
        The layer's input.
    rotary : (cos, sin), each (1 or B, T, head width)
    valid : Tensor (B, T), bool
        False at padding.
    queries : Tensor (B, Q), int64
        Where the tokens stand that ask.

    Returns
    -------
    Tensor (B, H, Q, T), float32
        Rows of the causal softmax; 0 at padding.
    """
    attention = layer.self_attn
    batch, length, _ = hidden.shape
    normed = layer.input_layernorm(hidden)
    asking = gather_tokens(normed, queries)
    keys = attention.k_proj(normed).view(batch, length, -1, attention.head_dim).transpose(1, 2)
    query = attention.q_proj(asking).view(batch, queries.shape[1], -1, attention.head_dim).transpose(1, 2)
    cos, sin = (part.expand(batch, -1, -1) for part in rotary)
    # Both arguments are rotated by the same angles: the queries' positions first, then the keys'.
    query, _ = apply_rotary_pos_emb(query, query, gather_tokens(cos, queries), gather_tokens(sin, queries))
    keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)  # (B, H, T, head width)
    logits = (query @ keys.mT).float() * attention.scaling  # (B, H, Q, T)
    earlier = torch.arange(length, device=hidden.device) <= queries[:, :, None]  # (B, Q, T)
    return logits.masked_fill(~(earlier & valid[:, None, :]).unsqueeze(1), -torch.inf).softmax(dim=-1)


def last_token_attention(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    valid: torch.Tensor,
    prompt: torch.Tensor | None = None,
) -> torch.Tensor:
    """`query_attention` of each row's last prompt token (by default its last token): (B, T, H), float32."""
    asking = valid if prompt is None else prompt
    last = asking.shape[1] - 1 - asking.flip(1).int().argmax(dim=1)  # (B,)
    return query_attention(layer, hidden, rotary, valid, last[:, None])[:, :, 0].transpose(1, 2)


def rater_attention(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    valid: torch.Tensor,
    raters: torch.Tensor,
) -> torch.Tensor:
    """`query_attention` of chosen tokens, averaged over heads and over each row's raters: (B, T), float32.

    Parameters
    ----------
    raters : Tensor (B, T), bool
        Rows without one get zeros.
    """
    rows = []
    for row in range(len(hidden)):
        asking = raters[row].nonzero().flatten()[None]
        if asking.shape[1] == 0:
            rows.append(torch.zeros(hidden.shape[1], device=hidden.device))
            continue
        own = slice(row, row + 1)
        turned = tuple(part[own] if len(part) > 1 else part for part in rotary)
        rows.append(query_attention(layer, hidden[own], turned, valid[own], asking)[0].mean(dim=(0, 1)))
    return torch.stack(rows)


def choose_raters(rows: Sequences, pruner: Pruner) -> torch.Tensor:
    """The text tokens behind each row's first image that the pruner takes as raters, as places in the prompt.

    Returns
    -------
    Tensor (B, T), bool
        Over the embedded prompts, before any drop.
    """
    chosen = torch.zeros_like(rows.valid)
    for row, images in enumerate(rows.index):
        visual = images != TEXT
        text = (~visual & rows.prompt[row] & (visual.cumsum(0) > 0)).nonzero().flatten()
        if len(text) and bool(visual.any()):
            chosen[row, text] = pruner.raters(rows.hidden[row, visual], rows.hidden[row, text])
    return chosen


def refuse_images_without_text(rows: Sequences, pruner: Pruner) -> None:
    """Raise a `ValueError` if an image has no text of the prompt behind it, for methods that ask the text."""
    text = rows.prompt & (rows.index == TEXT)
    behind = text.flip(1).int().cumsum(dim=1).flip(1)
    if bool(((behind == 0) & (rows.index != TEXT)).any()):
        raise ValueError(
            f"{type(pruner).__name__} ranks visual tokens by the attention of the text behind them, but an image of "
            "the prompt has none"
        )


def _spans(
    index: torch.Tensor, facts: Sequence[tuple[ImageTokens, PromptFacts]], alone: bool
) -> list[list[tuple[int, int, torch.Tensor]]]:
    """Groups of (row, image, places) of the same size and layout, then and now; `alone`: every image by itself."""
    groups: dict[object, list[tuple[int, int, torch.Tensor]]] = {}
    for row, images in enumerate(index):
        for image in images.unique().tolist():
            if image != TEXT:
                places = (images == image).nonzero().flatten()
                then = facts[image][0]
                kind = (row, image) if alone else (len(then.features), then.layout, len(places))
                groups.setdefault(kind, []).append((row, image, places))
    return list(groups.values())


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
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        prefixes = getattr(past_key_values, "kept_prefixes", None) if cached else None
        if self.layer_drop is None or (visual_index is None and prefixes is None):
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
                past_key_values=past_key_values,
                use_cache=use_cache,
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
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, hidden) if collect else None,
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
            past_key_values=None if cache is None else _LengthOfLayer(cache, depth),
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
