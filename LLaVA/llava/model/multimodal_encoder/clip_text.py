"""CLIP's text tower: how much each patch of an image resembles a question."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from llava.pruning.similarity import text_similarity

_BEGINS_USER = re.compile(r"\b(?:USER|Human):|\[INST\]|<\|im_start\|>user\b")
_BEGINS_ASSISTANT = re.compile(r"\b(?:ASSISTANT|Assistant):|\[/INST\]|<\|im_start\|>assistant\b|assistant\n\Z")
_SEPARATOR = re.compile(r"###|</s>|<\|im_end\|>")


def question_text(prompt: str) -> str:
    """The user's last words in the text after an image, in any of the conversation templates.

    Special tokens may be left in or out; without any role marks the text is the question itself.
    """
    last_turn = _BEGINS_USER.split(prompt)[-1]
    return _SEPARATOR.sub("", _BEGINS_ASSISTANT.split(last_turn)[0]).strip()


class ClipText:
    """The half of a CLIP checkpoint that a vision tower leaves out, for scoring its patches against a text.

    It works in float32, and on the device of the features that it is given.

    Parameters
    ----------
    tower : str
        A local folder or a hub id that holds the whole CLIP model with its tokenizer.
    hub : mapping, optional
        ``cache_dir``, ``token`` and so on for a hub id.

    Raises
    ------
    ValueError
        If there is no text tower, or no tokenizer; the message names the tower.
    """

    def __init__(self, tower: str, hub: Mapping[str, Any] | None = None):
        from transformers import AutoConfig, CLIPModel, CLIPTokenizer

        hub = hub or {}
        try:
            kind = AutoConfig.from_pretrained(tower, **hub).model_type
        except (OSError, ValueError) as error:
            raise _no_text_tower(tower, str(error)) from error
        if kind != "clip":
            raise _no_text_tower(tower, f"its configuration is that of a {kind}, not of a clip")
        try:
            model, report = CLIPModel.from_pretrained(tower, dtype=torch.float32, output_loading_info=True, **hub)
            tokenizer = CLIPTokenizer.from_pretrained(tower, **hub)
        except (OSError, ValueError, RuntimeError) as error:
            raise _no_text_tower(tower, str(error)) from error
        if report["missing_keys"]:
            raise _no_text_tower(tower, f"its weights lack {min(report['missing_keys'])}")
        # Without its files a tokenizer is built all the same, of special tokens alone.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise _no_text_tower(tower, "it has no tokenizer")
        self.tokenizer = tokenizer
        self.segment_length = model.config.text_config.max_position_embeddings - 2
        self._text = torch.nn.ModuleList([model.text_model, model.text_projection]).eval().requires_grad_(False)
        # Of the vision half only what comes after its layers: the tower itself is there already.
        self._image = torch.nn.Sequential(model.vision_model.post_layernorm, model.visual_projection)
        self._image.eval().requires_grad_(False)

    def segments(self, text: str) -> list[list[int]]:
        """A text's token ids in as many segments as it takes, each with a beginning and an end of its own.

        The published code cuts the marked sequence itself, so that of a long text only the first segment begins and
        only the last one ends with a mark, where CLIP reads the text's embedding.
        """
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        starts = range(0, max(1, len(ids)), self.segment_length)
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [[first, *ids[start : start + self.segment_length], last] for start in starts]

    @torch.no_grad()
    def embed_text(self, text: str) -> torch.Tensor:
        """A text in CLIP's common space: (M, C), float32, one row a segment."""
        encoder: Any
        projection: Any
        encoder, projection = self._text
        device = projection.weight.device
        segments = [torch.tensor(ids).to(device, non_blocking=True) for ids in self.segments(text)]
        with torch.autocast(device.type, enabled=False):
            pooled = [encoder(input_ids=ids[None]).pooler_output for ids in segments]
            return projection(torch.cat(pooled))

    @torch.no_grad()
    def embed_patches(self, encoder_hidden: torch.Tensor) -> torch.Tensor:
        """Patches of the vision encoder (B, N, C) in CLIP's common space, where CLIP itself puts [CLS] only."""
        with torch.autocast(encoder_hidden.device.type, enabled=False):
            return self._image(encoder_hidden.float())

    def similarity(self, encoder_hidden: torch.Tensor, text: str) -> torch.Tensor:
        """Cosine (B, N), float32, between patches and a text, averaged over the text's segments.

        The patches (B, N, C) are as the vision tower hands them to the projector.
        """
        self._text.to(encoder_hidden.device)
        self._image.to(encoder_hidden.device)
        return text_similarity(self.embed_patches(encoder_hidden), self.embed_text(text))


def _no_text_tower(tower: str, reason: str) -> ValueError:
    return ValueError(
        f"The vision tower {tower!r} comes without CLIP's text tower ({reason}): set CDPRUNER_RELEVANCE=embeddings"
    )
