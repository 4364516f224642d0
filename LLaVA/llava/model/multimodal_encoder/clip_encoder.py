"""The CLIP vision tower: pixels in, the features of one of its layers out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from llava.model.checkpoint import first_line, refuse_lfs_notes
from llava.model.multimodal_encoder.clip_text import ClipText
from llava.model.multimodal_encoder.observations import EncoderObserver, Output
from llava.model.offload import execution_device


class PublishedNames(nn.Module):
    """CLIP's image encoder with its weights named as published checkpoints name them, ``vision_model.encoder...``.

    transformers 5 left that level out. The published LLaVA cannot read weights without it, and published pruning code
    reaches the encoder through it.
    """

    def __init__(self, model: CLIPVisionModel):
        super().__init__()
        self.vision_model = model

    def forward(self, *args, **kwargs):
        return self.vision_model(*args, **kwargs)

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_model.dtype

    @property
    def device(self) -> torch.device:
        return execution_device(self.vision_model)


class CLIPVisionTower(nn.Module):
    """CLIP's image encoder, cut off at the layer that LLaVA reads.

    Parameters
    ----------
    vision_tower : str
        A local folder or a hub id that holds the CLIP model and its image processor.
    args : object
        Carries ``mm_vision_select_layer`` (index into the hidden states, -2 for the published checkpoints) and
        ``mm_vision_select_feature`` ("patch", the default, or "cls_patch").
    delay_load : bool
        Build the modules from the tower's configuration only; the weights follow from the LLaVA checkpoint or from
        `load_model`. Not with ``args.unfreeze_mm_vision_tower``, unless a checkpoint is just being loaded.
    hub : mapping, optional
        ``cache_dir``, ``token`` and so on for a hub id.

    Attributes
    ----------
    is_loaded : bool
        Whether the weights are in place.
    in_own_folder : bool
        Whether they were read from the tower's own folder or repository, not from a LLaVA checkpoint.

    Raises
    ------
    ValueError
        If the tower's configuration cannot be read.
    """

    def __init__(self, vision_tower: str, args, delay_load: bool = False, hub: Mapping[str, Any] | None = None):
        super().__init__()
        self.hub = dict(hub or {})
        self.is_loaded = self.in_own_folder = False
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        try:
            self.cfg_only = CLIPVisionConfig.from_pretrained(vision_tower, **self.hub)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Cannot read the configuration of the vision tower {vision_tower!r}: {first_line(error)}"
            ) from error
        # transformers builds a model on the meta device to fill it from a checkpoint, and loads no other model there.
        being_filled = torch.get_default_device().type == "meta"
        if delay_load and (being_filled or not getattr(args, "unfreeze_mm_vision_tower", False)):
            self.vision_tower = PublishedNames(CLIPVisionModel(self.cfg_only))
            self.vision_tower.requires_grad_(False)
        else:
            self.load_model()

    def load_model(self, device_map=None, dtype: torch.dtype | None = None) -> None:
        """Read weights and image processor from the tower's own folder; does nothing when they are loaded.

        ``device_map`` goes to ``CLIPVisionModel.from_pretrained``; a ``dtype`` of None means float32.
        """
        if self.is_loaded:
            return
        try:
            if Path(self.vision_tower_name).is_dir():
                refuse_lfs_notes(Path(self.vision_tower_name))
            model = CLIPVisionModel.from_pretrained(
                self.vision_tower_name, device_map=device_map, dtype=dtype or torch.float32, **self.hub
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"Cannot load the vision tower {self.vision_tower_name!r}: {first_line(error)}") from error
        self.vision_tower = PublishedNames(model).eval()
        self.mark_loaded()
        self.in_own_folder = True

    def mark_loaded(self) -> None:
        """Declare that the weights are in place, freeze them, and read the image processor."""
        self.vision_tower.requires_grad_(False)
        # The PIL processor resizes as the published models were trained; the torchvision one is a grey level off.
        self.image_processor = CLIPImageProcessorPil.from_pretrained(self.vision_tower_name, **self.hub)
        self.is_loaded = True

    def hidden_state(self, images: torch.Tensor, observer: EncoderObserver | None = None) -> torch.Tensor:
        """The hidden state ``select_layer`` (B, 1 + N, D), running no layer beyond it; an observer sees every layer.

        The layers are called one by one: the output-capturing hooks of transformers 5 run twice on a model nested in
        another one, and ``hidden_states[-2]`` would then be another layer's.
        """
        model, depth = self.vision_tower.vision_model, self.depth
        layers = model.encoder.layers
        hidden = model.pre_layrnorm(model.embeddings(images))
        for number, layer in enumerate(layers[:depth]):
            if observer is not None:
                observer.before_layer(number, layer, hidden)
            hidden = layer(hidden, None)
        if observer is not None:
            observer.finish(layers[min(depth, len(layers) - 1)], hidden)
        return hidden

    @cached_property
    def clip_text(self) -> ClipText:
        """The text tower of the same CLIP, for methods that compare images with a question."""
        return ClipText(self.vision_tower_name, self.hub)

    @property
    def depth(self) -> int:
        """How many of the tower's layers run; a ValueError if ``select_layer`` is outside the tower."""
        layers = self.config.num_hidden_layers
        depth = self.select_layer if self.select_layer >= 0 else layers + 1 + self.select_layer
        if not 0 <= depth <= layers:
            raise ValueError(f"mm_vision_select_layer {self.select_layer} is outside the tower's {layers} layers")
        return depth

    @torch.no_grad()
    def layer_output(self, images: torch.Tensor, layer: int) -> torch.Tensor:
        """The patches (B, N, D) after layer ``layer``, counted from 0; no layer beyond it runs."""
        model = self.vision_tower.vision_model
        hidden = model.pre_layrnorm(model.embeddings(images.to(device=self.device, dtype=self.dtype)))
        for each in model.encoder.layers[: layer + 1]:
            hidden = each(hidden, None)
        return hidden[:, 1:]

    def feature_select(self, image_forward_outs) -> torch.Tensor:
        """Pick layer and tokens out of an output that carries all ``hidden_states``; see `select_tokens`."""
        return self.select_tokens(image_forward_outs.hidden_states[self.select_layer])

    def select_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, 1 + N, D) -> the patches (B, N, D), or [CLS] and patches where ``select_feature`` is "cls_patch"."""
        if self.select_feature == "patch":
            return hidden[:, 1:]
        if self.select_feature == "cls_patch":
            return hidden
        raise ValueError(f"Unexpected select feature: {self.select_feature}")

    @torch.no_grad()
    def forward(self, images: torch.Tensor | list[torch.Tensor]):
        """Normalised pixels (B, 3, H, W) -> features (B, N, D) in their dtype; a list of (3, H, W): of (1, N, D)."""
        if isinstance(images, list):
            return [self(image.unsqueeze(0)) for image in images]
        features = self.hidden_state(images.to(device=self.device, dtype=self.dtype))
        return self.select_tokens(features).to(images.dtype)

    @torch.no_grad()
    def observe(
        self, images: torch.Tensor, wanted: Iterable[Output]
    ) -> tuple[torch.Tensor, dict[Output, torch.Tensor]]:
        """Encode pixels (B, 3, H, W), and record what pruning methods need.

        Returns the features as from `forward`, and {output: (B, N, ...)}, zeros at [CLS] where ``select_feature`` is
        "cls_patch". A ValueError if a layer that is asked for does not run.
        """
        observer = EncoderObserver(wanted, self.depth)
        hidden = self.hidden_state(images.to(device=self.device, dtype=self.dtype), observer)
        outputs = observer.outputs
        if self.select_feature == "cls_patch":
            outputs = {name: torch.cat([torch.zeros_like(one[:, :1]), one], dim=1) for name, one in outputs.items()}
        return self.select_tokens(hidden).to(images.dtype), outputs

    @property
    def dummy_feature(self) -> torch.Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


class CLIPVisionTowerS2(CLIPVisionTower):
    """The tower at several scales: the name exists, and refuses to work."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("s2 is not supported; no published checkpoint has a vision tower at several scales")
