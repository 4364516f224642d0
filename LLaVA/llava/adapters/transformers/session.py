"""The hooks that prune a model of transformers: switching them on and off, and what they do in each call."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch

from llava.adapters.transformers.encoder import EncoderView, Signals, has_cls_token
from llava.adapters.transformers.family import FAMILIES, Family, Model, anyres, why_not
from llava.adapters.transformers.images import Encoding, PromptImage
from llava.adapters.transformers.inputs import (
    KeptPrompt,
    Prefill,
    all_features,
    kept_columns,
    kept_features,
    kept_inputs,
    kept_positions,
    spread,
    token_types,
    tokens_left,
)
from llava.adapters.transformers.inside import InsideDecoder
from llava.constants import IGNORE_INDEX
from llava.pruning.config import PruningConfig
from llava.pruning.reduce import reduce_images
from llava.pruning.rows import KeptColumns, cache_of
from llava.pruning.schedule import kept_per_layer
from llava.pruning.scheduled import drops_before_decoder, drops_inside_decoder
from llava.pruning.signals import DECODER_SIGNALS, ENCODER_SIGNALS
from llava.pruning.tokens import KeptTokens

ATTRIBUTE = "_visual_token_pruning"
ANOTHER_TURN = (
    "a further turn on the KV cache of a pruned prompt counts its columns wrongly: start each turn without a cache"
)
ANOTHER_METHOD = "the KV cache holds prompts that lost tokens inside the decoder: go on under that method"


def set_pruning(model: Model, config: PruningConfig | None) -> Session | None:
    """Prune as ``config`` says from the next call on; None leaves the model as it was before.

    Parameters
    ----------
    model
        A vision-language model of transformers, with its language-model head.
    config : PruningConfig or None

    Returns
    -------
    Session, or None

    Raises
    ------
    ValueError
        If the family of models is not supported, or the method cannot work in this model.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    session = None if config is None else Session(model, config)  # refuses before anything is changed
    before = active_session(model)
    if before is not None:
        before.detach()
    if session is not None:
        session.attach()
    return session


def active_session(model: Model) -> Session | None:
    """What prunes a model now, if anything does."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model.__dict__.get(ATTRIBUTE)


class Session:
    """One model with one method.

    Attributes
    ----------
    config : PruningConfig
    visual_token_counts : list of (total, kept)
        Of each image of the latest prompts, row by row.
    seen : Counter
        "images", "total" and "kept" of all prompts since pruning was switched on.
    error : Exception or None
        What ended the first call that failed, for users of programs that log errors and go on.
    """

    def __init__(self, model: Model, config: PruningConfig):
        self.family = _family(model)
        text = model.config.get_text_config()
        config = config.for_width(text.hidden_size)
        if self.family.to_tokens is not None:
            config = config.for_encoder(has_cls_token(model.get_encoder("image")))
        self.model, self.config = model, config
        self.pruner = self.config.build_pruner()
        self.schedule = self.config.schedule(text.num_hidden_layers)
        self.visual_token_counts: list[tuple[int, int]] = []
        self.seen: Counter[str] = Counter()
        self.error: Exception | None = None
        self.encoder: EncoderView | None = None
        self.inside: InsideDecoder | None = None
        self._hooks = ExitStack()
        self._prefill: Prefill | None = None
        self._left: tuple[KeptColumns, list[tuple[int, torch.Tensor]]] | None = None
        self._refuse_what_cannot_work()

    def _refuse_what_cannot_work(self) -> None:
        kind, method = self.model.config.model_type, self.config.method
        if not self.schedule:
            raise ValueError(f"{method} is fitted to a model of this package only: give {kind} a recipe")
        self.before = drops_before_decoder(self.pruner, self.schedule)
        inside, drops = drops_inside_decoder(self.pruner, self.schedule)
        others = self.pruner.needs - {"image_keys", "question"} - ENCODER_SIGNALS
        missing = sorted(others if self.before else others - DECODER_SIGNALS)
        if missing:
            raise ValueError(f"{method} needs {', '.join(missing)}, which is not available for {kind}")
        if self.pruner.drop_duplicates and self.family.layouts in (None, anyres):
            raise ValueError(f"drop_duplicates needs tokens on a plain grid of patches, which those of {kind} are not")
        if self.pruner.needs & ENCODER_SIGNALS:
            if self.family.to_tokens is None:
                raise ValueError(f"{method} looks at the vision encoder, which is not available for {kind}")
            self.encoder = EncoderView(self.model, self.pruner)
            self.pruner.check_model(None, self.encoder.width)
        if drops:
            self.inside = InsideDecoder(self.model, inside, drops)
        if self._multimodal_rope and self.pruner.position_ids == "compact":
            raise ValueError(f"{kind} has rotary positions of several axes, which cannot be renumbered (compact)")

    @property
    def kept(self) -> list[torch.Tensor]:
        """Which tokens of each image of the latest prompts are left after the last drop: (k,), int64."""
        if self._left is None:
            return []
        columns, places = self._left
        return [tokens_left(columns, *place) for place in places]

    @property
    def _multimodal_rope(self) -> bool:
        return hasattr(self.model.base_model, "get_rope_index")

    @property
    def _compact(self) -> bool:
        return not self._multimodal_rope and self.pruner.position_ids != "original"

    @property
    def visual_tokens_per_layer(self) -> list[list[int]]:
        """Of each image of the latest prompts, the tokens in every decoder layer."""
        depth = self.model.config.get_text_config().num_hidden_layers
        if self.inside is None:
            return [[kept] * depth for _, kept in self.visual_token_counts]
        totals = [total for total, _ in self.visual_token_counts]
        return [kept_per_layer(self.schedule, total, depth, self.pruner.kept_count) for total in totals]

    # Switching on and off

    def attach(self) -> None:
        """Hook into the model."""
        base = self.model.base_model
        original = base.get_image_features
        signature = inspect.signature(original)

        # generate reads the signature, which functools.wraps keeps.
        @functools.wraps(original)
        def described(*args, **kwargs):
            nothing: AbstractContextManager[Signals] = nullcontext({})
            with nothing if self.encoder is None else self.encoder.observed() as patches:
                output = original(*args, **kwargs)
            given = signature.bind_partial(*args, **kwargs).arguments
            inputs = {**given, **given.get("kwargs", {})}
            output.encoding = Encoding.of(base, self.family, self.pruner, output, inputs, patches)
            return output

        base.get_image_features = described
        self._hooks.callback(base.__dict__.pop, "get_image_features")
        self._hooks.callback(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True).remove)
        self._hooks.callback(self.model.register_forward_hook(self._after_forward, with_kwargs=True).remove)
        if self.inside is not None:
            self.inside.attach(self._hooks)
        self.model.__dict__[ATTRIBUTE] = self
        self._hooks.callback(self.model.__dict__.pop, ATTRIBUTE)

    def detach(self) -> None:
        """Leave the model as it was."""
        self._hooks.close()

    # Each call

    def _before_forward(self, model: Model, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        try:
            return (), self._rewritten(
                dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
            )
        except Exception as error:
            self.error = self.error or error
            raise

    def _rewritten(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.inside is not None:
            self.inside.finish()  # a call that failed
        self._prefill = None
        cache = cache_of(inputs)
        cached = 0 if cache is None else cache.get_seq_length()
        if cache is not None and not cached:
            cache.__dict__.pop(ATTRIBUTE, None)  # it was reset
        prompt = getattr(cache, ATTRIBUTE, None)
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if inputs.get("pixel_values") is None and encoded is None:
            return inputs if prompt is None else self._step(inputs, prompt, cached)
        if cached:
            raise NotImplementedError("images after a filled KV cache are not pruned: start each turn without a cache")
        return self._start(inputs)

    def _step(self, inputs: dict[str, Any], prompt: KeptPrompt, cached: int) -> dict[str, Any]:
        """A decoding step after a pruned prompt."""
        given, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        _refuse_prepared_mask(given)
        text = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        since, new = cached - prompt.cached, text.shape[1]
        following = prompt.positions(since, new)
        if positions is not None and prompt.shift is not None:
            positions = positions - prompt.shift
        counted = given is None or given.shape[1] == prompt.length + since + new
        if new > 1 and positions is not None:
            # Of four rows the first has no gaps.
            axes = slice(1, None) if len(positions) == 4 and positions.ndim == 3 else slice(None)
            counted &= not bool((positions[axes, ..., 0] != following[axes, ..., 0]).any())
        if not counted:
            raise NotImplementedError(ANOTHER_TURN)
        if prompt.left:
            if self.inside is None:
                raise NotImplementedError(ANOTHER_METHOD)
            self.inside.resume(prompt.left, None if given is None else given[:, prompt.length :])
        return {
            **inputs,
            "attention_mask": prompt.mask(given, since + new),
            "position_ids": following if positions is None else positions,
        }

    def _start(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a prefill without what the pruner does not keep of every image before the decoder."""
        ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
        if ids is None:
            raise NotImplementedError("pruning reads input_ids beside the images, not inputs_embeds")
        _refuse_prepared_mask(inputs.get("attention_mask"))
        if positions is None:
            positions = self.model._prepare_position_ids_for_generation(ids, inputs) + self.family.first_position
        inputs, images = self.encode(inputs)
        valid, drops = _valid(inputs), False
        labels = None if self.inside is None else inputs.pop("labels", None)
        prefill = Prefill(images, ids.shape[1], KeptColumns.whole(valid), positions, labels=labels)
        totals = left = [len(image.tokens) for image in images]
        if self.before:
            kept = reduce_images(self.pruner, [image.tokens for image in images], self.schedule[0][1])
            left = [len(one.indices) for one in kept]
            drops = left != totals or self.pruner.varies
        outputs = inputs["mm_encoder_outputs"]
        if drops:
            inputs, prefill = self._drop_before(inputs, prefill, kept)
        else:  # `reduce` hands such images on as they came
            inputs["mm_encoder_outputs"] = outputs | {"image": all_features(outputs["image"])}
        if self.inside is not None:
            depth = len(self.inside.layers)
            left = [kept_per_layer(self.schedule, n, depth, self.pruner.kept_count)[-1] for n in totals]
            inputs, prefill = self._start_inside(self.inside, inputs, prefill, valid)
        self._prefill = prefill if drops or self.inside is not None else None
        self._left = prefill.entered, [(image.row, image.columns) for image in images]
        self.visual_token_counts = list(zip(totals, left, strict=True))
        self.seen.update(images=len(totals), total=sum(totals), kept=sum(left))
        return inputs

    def _drop_before(
        self, inputs: dict[str, Any], prefill: Prefill, kept: Sequence[KeptTokens]
    ) -> tuple[dict[str, Any], Prefill]:
        """Prompts with the kept tokens alone."""
        entered, shift = kept_columns(prefill.entered.present, prefill.images, kept), None
        positions = kept_positions(entered, prefill.positions)
        if self._compact:
            new = entered.positions() + self.family.first_position
            positions, shift = new, positions[..., -1:] - new[..., -1:]
        # Without a mask, gaps in the positions would be read as borders between packed sequences.
        masked = inputs.get("attention_mask") is not None or not self._compact or not bool(entered.present.all())
        outputs = inputs["mm_encoder_outputs"]
        inputs |= kept_inputs(inputs, entered, self._pad_id()) | {
            "attention_mask": entered.present.long() if masked else None,
            "position_ids": positions,
            "mm_encoder_outputs": outputs | {"image": kept_features(outputs["image"], prefill.images, kept)},
        }
        return inputs, replace(prefill, entered=entered, positions=positions, shift=shift)

    def _start_inside(
        self, inside: InsideDecoder, inputs: dict[str, Any], prefill: Prefill, valid: torch.Tensor
    ) -> tuple[dict[str, Any], Prefill]:
        """Prompts, False at padding in ``valid`` (B, T), of which the decoder's layers are to lose tokens."""
        entered, positions = prefill.entered, prefill.positions
        if inputs.get("position_ids") is None and not self._multimodal_rope:
            # As the model itself counts, padding included.
            positions = torch.arange(valid.shape[1], device=valid.device)[None] + self.family.first_position
        # The first answer and all that follows it must not choose what is kept.
        asked = _known(inputs, valid)
        if prefill.labels is not None:
            asked = asked & ((prefill.labels != IGNORE_INDEX).cumsum(dim=1) == 0)
        inside.start(valid, prefill.images, asked, token_types(inputs), entered)
        inputs |= {"attention_mask": entered.present.long(), "position_ids": positions}
        return inputs, replace(prefill, positions=positions)

    def encode(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], list[PromptImage]]:
        """Encode the images of prompts, with what the pruner looks at.

        Parameters
        ----------
        inputs : dict
            Arguments of ``forward``.

        Returns
        -------
        inputs : dict
            With the encoders' outputs in the place of pixels.
        images : list of PromptImage
            Row by row.
        """
        ids, inputs = inputs["input_ids"], self._encoded(inputs)
        output = inputs["mm_encoder_outputs"]["image"]
        if not hasattr(output, "encoding"):
            raise NotImplementedError("the images were encoded elsewhere, or the prefill is cut into chunks")
        valid = _valid(inputs)
        marks = ((ids == self.model.config.image_token_id) & valid).cpu()
        images = output.encoding.images(output, marks, self.family)
        if "question" in self.pruner.needs:
            for image in images:
                known = _known(inputs, valid)
                image.tokens.signals["question"] = self._question(image, images, ids, known, inputs.get("labels"))
        return inputs, images

    def _encoded(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with the encoders' outputs in the place of pixels, as ``generate`` does it."""
        base, outputs, inputs = self.model.base_model, dict(inputs.get("mm_encoder_outputs") or {}), dict(inputs)
        for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if inputs.get(pixels) is None:
                continue
            encode: Callable[..., Any] = getattr(base, f"get_{modality}_features")
            names = [name for name in inspect.signature(encode).parameters if inputs.get(name) is not None]
            outputs[modality] = encode(**{name: inputs[name] for name in names} | {"return_dict": True})
            inputs[pixels] = None
        return inputs | {"mm_encoder_outputs": outputs}

    def _question(
        self,
        image: PromptImage,
        images: list[PromptImage],
        ids: torch.Tensor,
        known: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """The embedded text (T, D) after the first image of an image's row, without what is to be predicted."""
        first = min(int(other.columns[0]) for other in images if other.row == image.row)
        row = ids[image.row]
        text = known[image.row] & (row != self.model.config.image_token_id)
        text &= torch.arange(len(row), device=row.device) > first
        if labels is not None:
            text &= labels[image.row] == IGNORE_INDEX
        return self.model.get_input_embeddings()(row[text])

    def _pad_id(self) -> int:
        """Any id of text."""
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return pad if isinstance(pad, int) and pad >= 0 and pad != self.model.config.image_token_id else 0

    def _after_forward(self, model: Model, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        prefill, self._prefill = self._prefill, None
        inside = {} if self.inside is None else self.inside.finish()
        if prefill is None:
            return output
        left, cache, logits = prefill.entered, cache_of(output), output.get("logits")
        if inside:
            left = inside[max(inside)].of_tokens_at(left.source)
            self._left = left, [(image.row, image.columns) for image in prefill.images]
        if prefill.labels is not None:
            labels = left.labels(prefill.labels, IGNORE_INDEX)[:, -logits.shape[1] :]
            vocabulary = self.model.config.get_text_config().vocab_size
            output.loss = self.model.loss_function(logits=logits, labels=labels, vocab_size=vocabulary)
        if cache is not None:
            setattr(cache, ATTRIBUTE, prefill.in_cache(inside, cache.get_seq_length()))
        elif kwargs.get("use_cache") or cache_of(kwargs) is not None:
            raise RuntimeError("this release of transformers hides the KV cache: decoding would go wrong")
        if logits is not None and logits.shape[1] == left.source.shape[1]:
            output.logits = spread(logits, left, prefill.length)
        return output


def _family(model: Model) -> Family:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    reason = why_not(kind, "mm_encoder_outputs" in inspect.signature(model.forward).parameters)
    if kind in FAMILIES and reason is not None:
        raise ValueError("pruning models of transformers needs transformers >= 5.18")
    if kind in FAMILIES and not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} has no language-model head: prune the model that generates")
    if reason is not None:
        raise ValueError(f"{kind!r} models cannot be pruned: {reason}. Supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def _valid(inputs: dict[str, Any]) -> torch.Tensor:
    """False at padding: (B, T), bool."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _known(inputs: dict[str, Any], valid: torch.Tensor) -> torch.Tensor:
    """``valid`` (B, T) without the candidates of assisted decoding, which asks for the logits of all of them."""
    asked = inputs.get("logits_to_keep")
    candidates = asked - 1 if isinstance(asked, int) and asked > 1 else 0
    return valid & (torch.arange(valid.shape[1], device=valid.device) < valid.shape[1] - candidates)


def _refuse_prepared_mask(mask: Any) -> None:
    if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
        raise NotImplementedError(
            "a static KV cache, whose masks are prepared ahead, cannot be used while tokens are pruned"
        )
