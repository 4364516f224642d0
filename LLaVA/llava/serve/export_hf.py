"""``python -m llava.serve.export_hf CHECKPOINT FOLDER``: a LLaVA checkpoint as transformers and vLLM read it.

The folder holds a model of transformers' own LLaVA (1.5) or LLaVA-NeXT (1.6) with the same weights in float16, a
processor that pads and cuts images as LLaVA does, a tokenizer with LLaVA's ids, and a chat template.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

from llava.command import Parser
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle, check_conv_mode, choose_conv_mode, conv_templates
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.model.tokenizer import SPACE

TEXT = (
    "{%- set text -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endset -%}"
)
"""Jinja: a message's images, then its text."""


def export(checkpoint: str, folder: Path, base: str | None = None, conv_mode: str | None = None) -> None:
    """Write a checkpoint as a folder that transformers and vLLM load.

    Parameters
    ----------
    checkpoint : str
        As for `load_pretrained_model`.
    folder : Path
        Made if need be; must be empty.
    base : str, optional
        Language model of a LoRA or projector-only checkpoint.
    conv_mode : str, optional
        A key of ``conv_templates``; by the checkpoint unless given.

    Raises
    ------
    ValueError
        If the checkpoint has a part that transformers' LLaVA has not, or the folder is not empty.
    OSError
        If the checkpoint cannot be read or the folder not be written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    name = get_model_name_from_path(checkpoint)
    check_conv_mode(conv_mode)
    if conv_mode is not None:
        _refuse_what_cannot_be_written(conv_mode)
    tokenizer, model, _, context = load_pretrained_model(checkpoint, base, name, device="cpu", multimodal=True)
    mode = choose_conv_mode(name, conv_mode, model.config, tokenizer)
    _refuse_what_cannot_be_written(mode)
    conversation = conv_templates[mode]
    _refuse_what_has_no_counterpart(model, checkpoint)
    fast = _tokenizer(tokenizer, context)
    exported = _model(model, fast.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN))
    processor = _processor(model, fast, _chat_template(conversation))
    folder.mkdir(parents=True, exist_ok=True)
    weights = {published_name(name): value for name, value in exported.state_dict().items()}
    exported.save_pretrained(folder, state_dict=weights, save_original_format=False)
    processor.save_pretrained(folder)


def _refuse_what_cannot_be_written(mode: str) -> None:
    conversation = conv_templates[mode]
    writable = {SeparatorStyle.TWO: True, SeparatorStyle.LLAMA_2: not conversation.system}
    if not writable.get(conversation.sep_style, False):
        raise ValueError(f"conversation mode {mode!r} cannot be written; choose one, as --conv-mode vicuna_v1")


def _refuse_what_has_no_counterpart(model: PreTrainedModel, checkpoint: str) -> None:
    config = model.config
    wanted = {"mm_projector_type": ("mlp2x_gelu",), "mm_patch_merge_type": ("flat", "spatial_unpad")}
    for field, allowed in wanted.items():
        found = getattr(config, field, "flat" if field == "mm_patch_merge_type" else "linear")
        if found not in allowed:
            raise ValueError(f"{checkpoint} has {field} {found!r}; transformers' LLaVA has {' or '.join(allowed)}")
    if getattr(config, "mm_use_im_start_end", False):
        raise ValueError(f"{checkpoint} puts <im_start> and <im_end> around images, which cannot be exported")


def _is_anyres(config: Any) -> bool:
    return getattr(config, "mm_patch_merge_type", "flat") == "spatial_unpad"


def _tokenizer(tokenizer: PreTrainedTokenizerBase, context: int) -> PreTrainedTokenizerFast:
    """LLaVA's ids from one string: text before and after an image is tokenised apart, each with a space in front.

    The chat template writes the <s>, and the tokenizer adds none: some engines tokenise a conversation with special
    tokens, some without, and each gets it once.
    """
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer, backend.post_processor = None, None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token or tokenizer.unk_token,
        model_max_length=context,
        padding_side="left",
    )
    fast.add_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return fast


def _model(model: PreTrainedModel, image_token_id: int) -> PreTrainedModel:
    """transformers' model with the same weights, and a row in the vocabulary for the image token."""
    config, tower = model.config, model.get_vision_tower()
    text_class = transformers.MistralConfig if "mistral" in config.model_type else transformers.LlamaConfig
    text = {name: value for name, value in config.to_dict().items() if name in text_class().to_dict()}
    text |= {"vocab_size": max(config.vocab_size, image_token_id + 1)}
    for name in ("model_type", "architectures", "transformers_version"):
        text.pop(name, None)
    common = {
        "vision_config": tower.config.to_dict() | {"model_type": "clip_vision_model"},
        "text_config": text_class(**text),
        "image_token_index": image_token_id,
        "image_seq_length": tower.num_patches,
        "vision_feature_layer": tower.select_layer,
        "vision_feature_select_strategy": "full" if tower.select_feature == "cls_patch" else "default",
        "tie_word_embeddings": False,
    }
    if _is_anyres(config):
        kind = transformers.LlavaNextForConditionalGeneration
        # (height, width) there, (width, height) here.
        pinpoints = [[height, width] for width, height in config.image_grid_pinpoints]
        made = transformers.LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
    else:
        kind, made = transformers.LlavaForConditionalGeneration, transformers.LlavaConfig(**common)
    with torch.device("meta"):
        exported = kind(made)
    missing, unexpected = exported.load_state_dict(_weights(model, text["vocab_size"]), strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(f"weights without a counterpart: {', '.join([*missing, *unexpected][:5])}")
    exported.generation_config = model.generation_config
    return exported.to(model.dtype)


def published_name(name: str) -> str:
    """A weight's name in the published folders, which transformers and vLLM read in every release."""
    names = {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.language_model.": "language_model.model.",
        "model.": "",
        "lm_head.": "language_model.lm_head.",
    }
    own = next(prefix for prefix in names if name.startswith(prefix))
    return names[own] + name.removeprefix(own)


def _weights(model: PreTrainedModel, vocabulary: int) -> dict[str, torch.Tensor]:
    """The weights by transformers' names."""
    names = {
        "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
        "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
        "model.image_newline": "model.image_newline",
        "lm_head.": "lm_head.",
        "model.": "model.language_model.",
    }
    found = {}
    for name, value in model.state_dict().items():
        own = next(prefix for prefix in names if name.startswith(prefix))
        if name in ("model.embed_tokens.weight", "lm_head.weight") and len(value) < vocabulary:
            # The mean row: its logit is the mean of all, so the token is never the most likely one.
            mean = value.float().mean(dim=0, keepdim=True).to(value.dtype)
            value = torch.cat([value, mean.expand(vocabulary - len(value), -1)])
        found[names[own] + name.removeprefix(own)] = value
    return found


def _processor(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, chat_template: str) -> ProcessorMixin:
    config, tower = model.config, model.get_vision_tower()
    own = tower.image_processor
    pixels = {name: getattr(own, name) for name in ("size", "crop_size", "image_mean", "image_std", "resample")}
    common = {
        "patch_size": tower.config.patch_size,
        "vision_feature_select_strategy": "full" if tower.select_feature == "cls_patch" else "default",
        "num_additional_image_tokens": 1,
        "image_token": DEFAULT_IMAGE_TOKEN,
        "chat_template": chat_template,
    }
    if _is_anyres(config):
        pinpoints = [[height, width] for width, height in config.image_grid_pinpoints]
        images = transformers.LlavaNextImageProcessorPil(**pixels, image_grid_pinpoints=pinpoints)
        return transformers.LlavaNextProcessor(images, tokenizer, **common)
    padded = getattr(config, "image_aspect_ratio", None) == "pad"
    return transformers.LlavaProcessor(
        transformers.LlavaImageProcessorPil(**pixels, do_pad=padded), tokenizer, **common
    )


def _chat_template(conversation: Conversation) -> str:
    """Jinja that writes a conversation as LLaVA's template does."""
    end = conversation.sep2
    if conversation.sep_style is SeparatorStyle.TWO:
        person, model = conversation.roles
        begin, answer = ["bos_token", "system", "' '"], [f"'{model}:'"]
        user, assistant = [f"'{person}: '", "text", "' '"], [f"'{model}: '", "text", f"'{end}'"]
    else:
        begin, answer = ["bos_token"], ["''"]
        user, assistant = ["'[INST] '", "text", "' [/INST]'"], ["' '", "text", f"' {end}'"]
    starts, asks, answers, continues = ("{{ " + " + ".join(parts) + " }}" for parts in (begin, user, assistant, answer))
    system = conversation.system.strip().replace("'", "\\'")
    return (
        "{%- set system = '" + system + "' -%}"
        "{%- if messages[0]['role'] == 'system' -%}{%- set message = messages[0] -%}"
        + TEXT
        + "{%- set system = text -%}{%- set messages = messages[1:] -%}{%- endif -%}"
        + starts
        + "{%- for message in messages -%}"
        + TEXT
        + "{%- if message['role'] == 'user' -%}"
        + asks
        + "{%- else -%}"
        + answers
        + "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}"
        + continues
        + "{%- endif -%}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("llava.serve.export_hf", "Write a LLaVA checkpoint as transformers and vLLM read it.")
    parser.add_argument("checkpoint", help="checkpoint folder, hub id, or llava-mini")
    parser.add_argument("folder", type=Path, help="where to write; new or empty")
    parser.add_argument("--model-base", help="language model of a LoRA or projector-only checkpoint")
    parser.add_argument("--conv-mode", help="conversation template (default: by the checkpoint)")
    return parser.run(_export, argv)


def _export(arguments: argparse.Namespace) -> None:
    export(arguments.checkpoint, arguments.folder, arguments.model_base, arguments.conv_mode)
    print(arguments.folder)


if __name__ == "__main__":
    raise SystemExit(main())
