"""One prefill, and what every layer's visual tokens receive in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.fitting.fitprune.samples import Sample
from llava.mm_utils import images_to, process_images
from llava.pruning.base import INSIDE, KeptTokens, Pruner, VisualTokens, gather_tokens

Look = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, visual_attention (n,), text_attention (n,)) -> which of the n present tokens stay, bool (n,); on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Observer(Pruner):
    """Shows each layer's attention of one image to a function, which says what stays."""

    stage: ClassVar[str] = INSIDE
    needs: ClassVar[frozenset[str]] = frozenset({"visual_attention", "text_attention"})
    after_attention: ClassVar[bool] = True
    varies: ClassVar[bool] = True

    look: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def reduce(self, tokens: VisualTokens) -> KeptTokens:
        stays = self.look(tokens.visual_attention[0].cpu(), tokens.text_attention[0].cpu())
        indices = stays.nonzero().flatten()[None].to(tokens.features.device)
        return KeptTokens(gather_tokens(tokens.features, indices), indices)


@torch.inference_mode()
def send(model, image_processor, sample: Sample, look: Look) -> None:
    """Run a prompt through an unpruned model's decoder, in which ``look`` decides what stays behind each attention.

    The text's attention is averaged over the text tokens behind the picture here.

    Raises
    ------
    ValueError
        If attention contains NaN, or the prompt cannot be used; the message names the sample, and the layer.
    """
    layer = -1

    def next_layer(visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        nonlocal layer
        layer += 1
        if not (visual.isfinite().all() and text.isfinite().all()):
            raise ValueError(
                f"the attention in decoder layer {layer} contains NaN or infinite values; a model that overflows in "
                "float16 needs bfloat16 or float32 (--dtype)"
            )
        return look(layer, visual, text / sample.text_behind)

    pixels = process_images([sample.image], image_processor, model.config)
    try:
        with _observed(model, next_layer):
            model(
                input_ids=sample.input_ids[None].to(model.device),
                images=images_to(pixels, model.device, model.dtype),
                image_sizes=[sample.image.size],
                logits_to_keep=1,
                use_cache=False,
            )
    except ValueError as error:
        raise ValueError(f"{sample.name}: {error}") from None


@contextmanager
def _observed(model, look: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    stages = tuple((layer, 1.0) for layer in range(1, model.config.num_hidden_layers + 1))
    model.use_pruner(Observer(look=look), stages)
    try:
        yield
    finally:
        model.use_pruner(None, ())
