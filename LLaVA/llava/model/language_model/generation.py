"""Forward and generate of every LLaVA, whatever its decoder."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import GenerationConfig

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.language_model.kv_cache import CACHE, Filling, cache_among
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.offload import execution_device
from llava.model.prefill import Prefill
from llava.pruning.rows import KeptColumns


class LlavaGenerationMixin(LlavaMetaForCausalLM):
    """Stands before a causal language model and feeds it spliced embeddings.

    ``prepare_inputs_labels_for_multimodal`` and ``encode_images`` are reached by plain attribute look-up, so a method
    that replaces them on `LlavaMetaForCausalLM` takes effect here.
    """

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in ``transformers``; a vision tower whose weights the checkpoint holds then counts as loaded.

        Otherwise a caller's ``load_model`` would put the untrained tower in the place of the checkpoint's own.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        tower = model.get_vision_tower()
        if tower is not None and not any(".vision_tower." in key for key in info["missing_keys"]):
            tower.mark_loaded()
        return (model, info) if output_loading_info else model

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images=None,
        image_sizes: list[tuple[int, int]] | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache_position=None,
        prefill: Prefill | None = None,
        cache=None,
        **kwargs,
    ):
        """The language model's forward pass over text and images.

        Parameters
        ----------
        input_ids : Tensor (B, T), int64
            With -200 where an image stands.
        images, image_sizes
            See `LlavaMetaForCausalLM.visual_tokens`.
        past_key_values : Cache, optional
            ``cache`` is another name for it.
        labels : Tensor (B, T), int64, optional
            -100 where no loss is wanted; the loss is the mean over the others that have logits, shifted by one. What
            is labelled, and what follows it, takes no part in choosing visual tokens.
        output_attentions, output_hidden_states, return_dict
            As the language model's forward takes them; their places among the arguments are the original's.
        logits_to_keep : int or Tensor
            How many of the last positions get logits; 0 means all.
        cache_position
            Accepted for older callers and ignored.
        prefill
            Of ``inputs_embeds``; see `DroppingDecoder.forward`.
        **kwargs
            What the language model's forward takes.

        Returns
        -------
        transformers.modeling_outputs.CausalLMOutputWithPast
        """
        past_key_values = cache_among(past_key_values, {"cache": cache} | kwargs)
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        kwargs |= {name: value for name, value in wanted.items() if value is not None}
        if inputs_embeds is None:
            prepared = self.prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = prepared
            # A decoding step has no images of its own, though generate goes on handing over the prompt's.
            prefill = getattr(prepared, "prefill", None)
            if prefill is not None and attention_mask is None:
                attention_mask = prefill.mask
            if inputs_embeds is None and input_ids is not None and input_ids.shape[1] > 1:
                self._refuse_marks(input_ids, images)
        if prefill is not None and prefill.active.inside_decoder:
            kwargs["prefill"] = prefill
            if labels is not None:
                # The first answer and all that follows it must not choose what is kept.
                kwargs["prompt_mask"] = (labels != IGNORE_INDEX).cumsum(dim=1) == 0
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **{CACHE: past_key_values},
            **kwargs,
        )
        if labels is not None:
            if prefill is not None and prefill.left is not None:
                labels = prefill.left.labels(labels.to(prefill.left.source.device), IGNORE_INDEX)
            if isinstance(logits_to_keep, int):
                labels = labels[:, -logits_to_keep:]
            loss = self.loss_function(outputs.logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            outputs = type(outputs)(**{**outputs, "loss": loss})
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, images=None, image_sizes=None, **kwargs) -> torch.Tensor:
        """Generate from text and images.

        Rows may be padded on either side; they are generated with left padding, so that each row gets what it would
        get alone.

        Parameters
        ----------
        inputs : Tensor (B, T), int64
            Prompts, with -200 where an image stands; ``input_ids`` is another name for it. With a filled
            ``past_key_values`` (or ``cache``) what follows it: all that it does not hold yet, and no more.
        images, image_sizes
            See `LlavaMetaForCausalLM.visual_tokens`.
        attention_mask : Tensor (B, T), optional
            Nonzero where there is prompt. Without it, a run of ``pad_token_id`` at either end of a row of a batch is
            taken as padding.
        **kwargs
            What ``transformers``' generate takes. ``max_length`` without ``max_new_tokens`` counts the new tokens and
            one more, as it did in the original.

        Returns
        -------
        Tensor (B, new), int64
            The new tokens only.

        Raises
        ------
        NotImplementedError
            If ``inputs_embeds`` is given.
        """
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("`inputs_embeds` is not supported")
        inputs = kwargs.pop("input_ids", inputs)
        if inputs is None:
            raise ValueError("generate needs input_ids")
        cache = cache_among(kwargs.pop("past_key_values", None), kwargs)
        position_ids = kwargs.pop("position_ids", None)
        mask = kwargs.pop("attention_mask", None)
        config = kwargs["generation_config"] = _counting_new_tokens(kwargs.get("generation_config"))
        given = [kwargs, {} if config is None else config.to_dict(), self.generation_config.to_dict()]
        pad_token_id, do_sample = (
            next((settings[name] for settings in given if settings.get(name) is not None), None)
            for name in ("pad_token_id", "do_sample")
        )
        if mask is None:
            mask = _mask_of_padding(inputs, pad_token_id)
        if "max_length" in kwargs and kwargs.get("max_new_tokens") is None:
            kwargs["max_new_tokens"] = max(1, kwargs.pop("max_length") - 1)

        if not do_sample:
            # Meaningless without sampling, and warned about at every call; evaluation harnesses pass temperature=0.
            for name in ("temperature", "top_p", "top_k"):
                kwargs.pop(name, None)

        prepared = self.prepare_inputs_labels_for_multimodal(
            inputs, position_ids, mask, cache, None, images, image_sizes
        )
        ids, position_ids, mask, _, embeds, _ = prepared
        prefill = getattr(prepared, "prefill", None)
        if embeds is None:
            self._refuse_marks(ids, images)
            embeds = self.get_model().embed_tokens(ids)
        padded = _left_padded(mask)
        if padded is not None:
            embeds, mask = padded.take(embeds), padded.take(mask)
            position_ids = None if position_ids is None else padded.take(position_ids)
        if prefill is not None and prefill.active.inside_decoder:
            if padded is not None:
                prefill.reorder(padded)
            kwargs |= {"prefill": prefill, "disable_compile": True}
        before = Filling.of(cache, mask.device)
        if before.length:
            # transformers takes a prompt as a whole and cuts off what the cache holds.
            content = before.grown(mask.shape[1], mask.bool()).mask
            assert content is not None  # there is one from the first mask on
            if position_ids is None:
                position_ids = before.new_positions(mask.shape[1], mask.bool())
            position_ids = nn.functional.pad(position_ids.expand(mask.shape), (before.length, 0))
            mask = content.to(mask.dtype)
            embeds = nn.functional.pad(embeds, (0, 0, before.cached, 0))
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        if cache is not None:
            kwargs[CACHE] = cache
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        """What the next step's forward pass takes, ``images`` and ``image_sizes`` included where they are given."""
        handed_on = {name: kwargs[name] for name in ("images", "image_sizes") if kwargs.get(name) is not None}
        cache = cache_among(past_key_values, kwargs)
        prepared = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **{CACHE: cache}, **kwargs
        )
        return prepared | handed_on

    def _refuse_marks(self, ids: torch.Tensor, images) -> None:
        """Raise an IndexError if prompts without an image to splice have marks, which no embedding stands for."""
        marks = int((ids == IMAGE_TOKEN_INDEX).sum())
        if not marks:
            return
        if self.get_vision_tower() is None:
            reason = "this model has no vision tower"
        elif images is None:
            reason = "no images came"
        else:
            reason = "a mark alone is no prompt: text has to stand beside it"
        plural = "s" if marks > 1 else ""
        raise IndexError(f"The prompts have {marks} image mark{plural} ({IMAGE_TOKEN_INDEX}), but {reason}")

    @property
    def device(self) -> torch.device:
        """Where inputs belong, also when weights are offloaded."""
        return execution_device(self)

    def get_model(self):
        """The decoder stack, which carries vision tower and projector."""
        return self.model


def _left_padded(mask: torch.Tensor) -> KeptColumns | None:
    """Every column of a batch (B, T), each row's content moved to its right end, where generation continues.

    None where nothing has to move.
    """
    return None if bool(mask[:, -1].all()) else KeptColumns.sorted(mask.bool())


def _counting_new_tokens(config: GenerationConfig | None) -> GenerationConfig | None:
    """The same settings with ``max_new_tokens`` for ``max_length``, from which the prompt would be taken off."""
    if config is None or config.max_length is None:
        return config
    config = copy.deepcopy(config)
    if config.max_new_tokens is None:
        config.max_new_tokens = max(1, config.max_length - 1)
    config.max_length = None
    return config


def _mask_of_padding(ids: torch.Tensor, pad_token_id: int | None) -> torch.Tensor:
    """True (B, T) but for the runs of padding at the ends of a batch's rows."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    if pad_token_id is None or len(ids) == 1:
        return mask
    text = (ids != pad_token_id).int()
    return (text.cummax(dim=1).values * text.flip(1).cummax(dim=1).values.flip(1)).bool()
