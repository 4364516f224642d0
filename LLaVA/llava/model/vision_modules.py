"""What a language model gets before it is trained to see: vision modules, and tokens that mark images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.checkpoint import read_tensors
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector


def initialize_vision_modules(model: Any, model_args: Any, fsdp: Any = None) -> None:
    """Give a plain language model its vision modules, before training.

    ``model_args`` carries vision_tower, mm_vision_select_layer, mm_vision_select_feature, mm_patch_merge_type,
    pretrain_mm_mlp_adapter (a file of projector weights, or None) and mm_projector_type. With ``fsdp`` the tower
    is kept in a list, out of the sight of the wrapper.
    """
    config = model.config
    config.mm_vision_tower = model_args.vision_tower
    tower = model.get_vision_tower()
    if tower is None:
        tower = build_vision_tower(model_args)
        model.vision_tower = [tower] if fsdp else tower
    else:
        tower.load_model()
    config.use_mm_proj = True
    config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
    config.mm_hidden_size = tower.hidden_size
    config.mm_vision_select_layer = model_args.mm_vision_select_layer
    config.mm_vision_select_feature = model_args.mm_vision_select_feature
    config.mm_patch_merge_type = getattr(model_args, "mm_patch_merge_type", "flat")
    if getattr(model, "mm_projector", None) is None:
        model.mm_projector = build_vision_projector(config)
        if "unpad" in config.mm_patch_merge_type:
            scale = config.hidden_size**-0.5
            model.image_newline = nn.Parameter(torch.randn(config.hidden_size, dtype=model.dtype) * scale)
    model.mm_projector.requires_grad_(True)
    if getattr(model_args, "pretrain_mm_mlp_adapter", None):
        weights = read_tensors(Path(model_args.pretrain_mm_mlp_adapter))
        prefix = "mm_projector."
        model.mm_projector.load_state_dict(
            {key.split(prefix)[1]: value for key, value in weights.items() if prefix in key}
        )


def initialize_vision_tokenizer(model: Any, model_args: Any, tokenizer: Any) -> None:
    """Add the image marker tokens that ``model_args`` asks for, before training.

    ``mm_use_im_patch_token`` and ``mm_use_im_start_end`` add tokens; new ones start as the mean embedding. With
    ``tune_mm_mlp_adapter`` the input embeddings are trained and the output embeddings are not;
    ``pretrain_mm_mlp_adapter`` names a file that holds trained embeddings of the start and end tokens.
    """
    if model_args.mm_use_im_patch_token:
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))
    if not model_args.mm_use_im_start_end:
        if model_args.mm_use_im_patch_token and model_args.tune_mm_mlp_adapter:
            model.get_input_embeddings().requires_grad_(False)
            model.get_output_embeddings().requires_grad_(False)
        return
    added = tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    if added:
        for embedding in (model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data):
            embedding[-added:] = embedding[:-added].mean(dim=0, keepdim=True)
    if model_args.tune_mm_mlp_adapter:
        model.get_input_embeddings().requires_grad_(True)
        model.get_output_embeddings().requires_grad_(False)
    if model_args.pretrain_mm_mlp_adapter:
        weights = read_tensors(Path(model_args.pretrain_mm_mlp_adapter))
        trained = weights["model.embed_tokens.weight"]
        model.get_input_embeddings().weight.data[-added:] = trained[-added:]
