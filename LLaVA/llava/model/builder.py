"""Load a LLaVA checkpoint of any published layout: full, projector-only, or LoRA."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.checkpoint import (
    ADAPTERS,
    EMBEDDED_MODEL,
    EXTRAS,
    HUB_OPTIONS,
    PROJECTOR,
    Checkpoint,
    Layout,
    is_of_transformers,
    open_checkpoint,
    read_config,
    read_tensors,
    resolve_model_path,
    unreadable,
)
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.offload import execution_device
from llava.model.tokenizer import load_tokenizer
from llava.pruning.config import PruningConfig
from llava.runtime import is_main_process

__all__ = ["EMBEDDED_MODEL", "announce_pruning", "load_pretrained_model", "read_config", "resolve_model_path"]

DEFAULT_CONTEXT_LENGTH = 2048
_WHERE_MISSING = {
    "full": "a projector-only or LoRA checkpoint needs model_base",
    "projector": f"neither model_base nor {PROJECTOR} has them",
    "adapters": f"neither model_base nor {EXTRAS} has them",
}
_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlavaConfig, LlavaLlamaForCausalLM),
    "mistral": (LlavaMistralConfig, LlavaMistralForCausalLM),
}


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict | None = "auto",
    device: str | torch.device = "cuda",
    use_flash_attn: bool = False,
    torch_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | str | None = None,
    multimodal: bool | None = None,
    customized_config: str | None = None,
    **kwargs: Any,
):
    """Load tokenizer, model and image processor.

    The switch (``BASELINE``, ``SUBSET_RATIO``, ``LAYER_INDEX``) is read once, here, before any weight.

    Parameters
    ----------
    model_path : str
        A checkpoint folder, a hub id, or "llava-mini" or "llava-mini-reader", which ship with the package.
    model_base : str or None
        The language model that a projector-only or LoRA checkpoint goes onto, or the LLaVA that adapters go onto.
    model_name : str
        Usually the last part of the path; ignored. The files decide what the checkpoint is: ``adapter_config.json``
        marks adapters, ``mm_projector.bin`` without other weights a projector, ``mm_vision_tower`` in ``config.json`` a
        LLaVA. Anything else loads as a plain language model.
    load_8bit, load_4bit : bool
        Quantise the language model with bitsandbytes; vision tower, projector and output layer stay as they are.
    device_map : str, dict or None
        Where the parts go; "auto" fills the GPUs. Overruled by a ``device`` other than "cuda".
    device : str or torch.device
        "cuda" leaves the choice to ``device_map``; anything else puts the whole model there.
    use_flash_attn : bool
        Use flash-attention 2, which must be installed.
    torch_dtype, dtype : torch.dtype or str
        Floating-point type of all weights; float16 when neither is given.
    multimodal : bool, optional
        True refuses a plain language model.
    customized_config
        Accepted for evaluation harnesses and ignored.
    **kwargs
        Go to ``from_pretrained`` (``attn_implementation``, ``max_memory``, ...). ``cache_dir``, ``token``,
        ``local_files_only`` and ``force_download`` hold for all that comes from the hub, ``revision`` for what comes
        from ``model_path``.

    Returns
    -------
    tokenizer, model, image_processor, context_len
        The model is in eval mode. image_processor is None for a plain language model. context_len is the
        configuration's ``max_sequence_length``, else 2048.

    Raises
    ------
    ValueError
        For a wrong switch, dtype or combination of arguments, a checkpoint of another architecture, a projector or
        adapters without their base, or a vision tower that is missing.
    OSError
        If the checkpoint, or a file of it, is missing or unreadable.
    """
    pruning = PruningConfig.from_env()
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    # A revision is one of this repository, not of the base's or the vision tower's.
    hub_elsewhere = {name: value for name, value in hub.items() if name != "revision"}
    kwargs |= _placement(device_map, device)
    kwargs["dtype"] = _dtype(dtype if dtype is not None else torch_dtype)
    if use_flash_attn:
        kwargs["attn_implementation"] = "flash_attention_2"
    if load_8bit or load_4bit:
        kwargs["quantization_config"] = _quantization(load_8bit, load_4bit)

    checkpoint = open_checkpoint(model_path, hub)
    base = open_checkpoint(model_base, hub_elsewhere) if model_base else None
    # Adapters that were trained on a whole model come without a configuration of their own.
    described = base if base and checkpoint.has(ADAPTERS) and not checkpoint.has("config.json") else checkpoint
    raw_config = read_config(str(described.folder))
    if is_of_transformers(raw_config):
        kind = raw_config.get("model_type")
        raise ValueError(
            f"{checkpoint.name} is in transformers' own layout ({kind}), as checkpoints under llava-hf/ are: give the "
            "original one, such as liuhaotian/llava-v1.5-7b, or load and prune it with transformers"
        )
    if not _is_llava(raw_config):
        if multimodal:
            raise ValueError(f"{checkpoint.name} is a language model without vision: give a LLaVA, such as llava-mini")
        return _load_plain(checkpoint, base, kwargs)
    config_class, model_class = _classes(raw_config, checkpoint.name)
    with _quiet():
        config = config_class.from_pretrained(described.folder)
    if getattr(config, "mm_vision_tower", None) is None:
        raise ValueError(f"{checkpoint.name} is no LLaVA: its config.json names no vision tower (mm_vision_tower)")
    if pruning is not None:
        pruning.blame(lambda pruning: pruning.schedule(config.num_hidden_layers))

    layout = checkpoint.layout(with_base=base is not None)
    weights = base or checkpoint
    weights.fetch_weights()
    tokenizer = load_tokenizer(weights.folder)
    folders = [str(each.folder) for each in (checkpoint, base) if each]
    kwargs["tower_source"] = {"folders": folders, "hub": hub_elsewhere}
    if layout == "adapters":
        # Training may have added tokens; the embeddings of all of them then lie beside the adapters.
        kwargs["ignore_mismatched_sizes"] = True
    model, missing = _load_weights(model_class, weights, config, kwargs)
    if layout == "adapters":
        if checkpoint.has(EXTRAS):
            missing -= _load_extra(model, _lora_extras(checkpoint))
        model = _merge_lora(model, checkpoint)
    elif layout == "projector":
        missing -= _load_extra(model, read_tensors(checkpoint.folder / PROJECTOR))
    _check_filled(model, missing, checkpoint.name, layout)
    model.config.name_or_path = checkpoint.name

    _add_image_tokens(model, tokenizer)
    model.prompt_tokenizer = tokenizer
    image_processor = _finish_vision_tower(model, tower_missing=any(".vision_tower." in key for key in missing))
    _tidy_generation_config(model)
    model.eval()
    announce_pruning(model)
    model.fit_pruning()
    return tokenizer, model, image_processor, getattr(config, "max_sequence_length", DEFAULT_CONTEXT_LENGTH)


def _placement(device_map, device) -> dict[str, Any]:
    """The ``device_map`` that ``from_pretrained`` gets."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda, cuda:0, mps or the like, not {device!r}") from None
    if str(device) == "cuda":
        return {"device_map": {"": "cpu"} if device_map == "auto" and not torch.cuda.is_available() else device_map}
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return {"device_map": {"": str(device)}}


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return torch.float16
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating type such as float32, float16 or bfloat16, not {dtype!r}")
    return found


def _quantization(load_8bit: bool, load_4bit: bool) -> BitsAndBytesConfig:
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other")
    untouched = ["vision_tower", "mm_projector", "lm_head"]
    if load_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=untouched)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=untouched,
    )


def _is_llava(raw_config: dict[str, Any]) -> bool:
    return "mm_vision_tower" in raw_config or str(raw_config.get("model_type", "")).startswith("llava")


def _classes(raw_config: dict[str, Any], path: str):
    """Configuration and model class by the checkpoint's own configuration, not by the name of its folder."""
    described = f"{raw_config.get('model_type', '')} {' '.join(raw_config.get('architectures') or [])}".lower()
    if "mpt" in described:
        raise ValueError(f"{path}: LLaVA on MPT is not supported (the original could not run it with images either)")
    if "mistral" in described:
        return _CLASSES["mistral"]
    if "llama" in described or raw_config.get("model_type") == "llava":
        return _CLASSES["llama"]
    raise ValueError(
        f"{path} holds model_type {raw_config.get('model_type')!r}, architectures "
        f"{raw_config.get('architectures')!r}; LLaVA on Llama or Mistral is supported"
    )


def _load_weights(
    model_class: type[PreTrainedModel], checkpoint: Checkpoint, config, kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, set[str]]:
    """The model with what the checkpoint holds of it, and the names of the weights it does not hold in this shape."""
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                checkpoint.folder, config=config, output_loading_info=True, **kwargs
            )
    except (RuntimeError, EOFError, KeyError, UnpicklingError, SafetensorError) as error:
        raise unreadable(checkpoint.name, error) from error
    return model, set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}


@contextmanager
def _quiet() -> Iterator[None]:
    """No transformers warnings inside: what the published checkpoints lack or spell in the old way is handled here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load_extra(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> set[str]:
    """Put weights that lie beside the language model's into the model, in its dtype; returns their names."""
    own = model.state_dict()
    unknown = [key for key in weights if key not in own]
    if unknown:
        raise ValueError(f"The checkpoint holds weights this model has not: {', '.join(unknown[:3])}")
    for key, value in weights.items():
        if own[key].is_meta:
            raise ValueError(f"{key} would be offloaded before it is filled: give max_memory or a device that holds it")
        if own[key].shape != value.shape:
            raise ValueError(f"{key} is {tuple(value.shape)} in the checkpoint, {tuple(own[key].shape)} in the model")
        own[key].copy_(value)
    return set(weights)


def _lora_extras(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What was trained beside the adapters, under the model's own names."""
    extras = read_tensors(checkpoint.folder / EXTRAS)
    extras = {key.removeprefix("base_model."): value for key, value in extras.items()}
    if any(key.startswith("model.model.") for key in extras):
        extras = {key.removeprefix("model."): value for key, value in extras.items()}
    return extras


def _merge_lora(model: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError("A LoRA checkpoint needs the package peft: pip install peft") from error
    if not checkpoint.has("adapter_model.safetensors", "adapter_model.bin"):
        raise OSError(f"{checkpoint.name} has no adapter_model.safetensors")
    adapters = PeftConfig.from_pretrained(checkpoint.folder)
    # The adapters were trained on the language model; the tower's projections only share their names.
    adapters.exclude_modules = r".*(vision_tower|mm_projector).*"
    try:
        return PeftModel.from_pretrained(model, checkpoint.folder, config=adapters).merge_and_unload()
    except (RuntimeError, UnpicklingError, SafetensorError) as error:
        raise unreadable(checkpoint.name, error) from error


def _check_filled(model: PreTrainedModel, missing: set[str], path: str, layout: Layout) -> None:
    """Nothing but a vision tower may be missing: what is missing would be left at random values."""
    names = sorted(key for key in missing if ".vision_tower." not in key)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"{path} does not hold all weights of {type(model).__name__}: {', '.join(names[:3])}{more} missing "
            f"({_WHERE_MISSING[layout]})"
        )


def _add_image_tokens(model: PreTrainedModel, tokenizer) -> None:
    if getattr(model.config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    if model.get_input_embeddings().num_embeddings != len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))


def _finish_vision_tower(model: PreTrainedModel, tower_missing: bool):
    """Fill the tower from its own folder unless the checkpoint brought its weights; returns the image processor."""
    tower = model.get_vision_tower()
    if tower_missing:
        projector = model.get_model().mm_projector
        beside = model.get_input_embeddings() if next(projector.parameters(), None) is None else projector
        tower.load_model(device_map={"": execution_device(beside)}, dtype=next(beside.parameters()).dtype)
    elif not tower.is_loaded:  # its weights lay beside the adapters
        tower.mark_loaded()
    return tower.image_processor


def _tidy_generation_config(model: PreTrainedModel) -> None:
    """Make the published generation settings mean what they meant, without a warning a call.

    ``max_length`` counted the tokens after the prompt; sampling temperatures without sampling mean nothing.
    """
    settings = model.generation_config
    if settings.max_length is not None and settings.max_new_tokens is None:
        settings.max_new_tokens = max(1, settings.max_length - 1)
    settings.max_length = None
    if not settings.do_sample:
        settings.temperature = settings.top_p = None


def announce_pruning(model: PreTrainedModel) -> None:
    """Print one line on stderr about what prunes the model, if anything does, and its method's advice."""
    if model.pruning is not None and is_main_process():
        print(f"llava: {model.pruning.describe()}", file=sys.stderr)
        for line in model.pruning.build_pruner().advice(model):
            print(f"{model.pruning.method}: {line}", file=sys.stderr)


def _load_plain(checkpoint: Checkpoint, base: Checkpoint | None, kwargs: dict[str, Any]):
    """A language model without vision, with adapters where there is a base."""
    layout = checkpoint.layout(with_base=base is not None)
    if layout == "projector":
        raise ValueError(f"{checkpoint.name} is no LLaVA: its config.json names no vision tower (mm_vision_tower)")
    weights = base or checkpoint
    weights.fetch_weights()
    is_llama = read_config(str(weights.folder)).get("model_type") in _CLASSES
    tokenizer = load_tokenizer(weights.folder) if is_llama else AutoTokenizer.from_pretrained(weights.folder)
    model = AutoModelForCausalLM.from_pretrained(weights.folder, **kwargs)
    if layout == "adapters":
        model = _merge_lora(model, checkpoint)
    context = getattr(model.config, "max_sequence_length", DEFAULT_CONTEXT_LENGTH)
    return tokenizer, model.eval(), None, context
