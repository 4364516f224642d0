"""A model asked questions about images, while something looks at the attention in each decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import benchmark_conv_mode, check_conv_mode, conv_templates, image_mark
from llava.fitting.data import Source
from llava.mm_utils import get_model_name_from_path, images_to, process_images, tokenizer_image_token
from llava.model.active_pruner import ActivePruner
from llava.pruning.base import INSIDE, Pruner
from llava.pruning.tokens import KeptTokens, VisualTokens, gather_tokens

Look = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, visual_attention (n,), text_attention (n,)) -> which of the n present tokens stay, bool (n,); on the CPU."""


@dataclass(frozen=True)
class Prompt:
    """A question about one image, as a model is asked it; the image is -200 in ``input_ids`` (T,), int64."""

    name: str
    input_ids: torch.Tensor
    image: Image.Image

    @property
    def text(self) -> int:
        """Text tokens."""
        return len(self.input_ids) - 1

    @property
    def text_after(self) -> int:
        """Text tokens after the image."""
        return self.text - int((self.input_ids == IMAGE_TOKEN_INDEX).nonzero())


class Prompts:
    """A source's questions as a model with this tokenizer and configuration is asked them, without an answer.

    ``conversation`` is a name of `llava.conversation.conv_templates`; by default the one that benchmarks ask it with.
    """

    def __init__(self, source: Source, tokenizer, config, conversation: str | None = None):
        check_conv_mode(conversation)
        name = get_model_name_from_path(getattr(config, "name_or_path", ""))
        self.source, self.conversation = source, conversation or benchmark_conv_mode(name, config, tokenizer)
        self._tokenizer, self._mark = tokenizer, image_mark(config)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Prompt:
        """Open one; an OSError if its image cannot be read, a ValueError if nothing is asked: both name the sample."""
        name = self.source.names[number]
        image, question = self.source.open(number)
        if not question.strip():
            raise ValueError(f"image {name}: nothing is asked; what is read is what the question attends to")
        turns = conv_templates[self.conversation].copy()
        turns.append_message(turns.roles[0], f"{self._mark}\n{question}")
        turns.append_message(turns.roles[1], None)
        return Prompt(name, tokenizer_image_token(turns.get_prompt(), self._tokenizer, return_tensors="pt"), image)

    def metadata(self) -> dict[str, Any]:
        """What they are, JSON-serialisable."""
        source = self.source
        return {
            "name": source.name,
            "digest": source.digest,
            "samples": len(source),
            "seed": source.seed,
            "conversation": self.conversation,
        }


@dataclass(frozen=True, kw_only=True)
class Observer(Pruner):
    """Shows each layer's attention of one image to a function, which decides what stays."""

    where: ClassVar[str] = INSIDE
    needs: ClassVar[frozenset[str]] = frozenset({"visual_attention", "text_attention"})
    after_attention: ClassVar[bool] = True
    varies: ClassVar[bool] = True

    look: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def reduce(self, tokens: VisualTokens) -> KeptTokens:
        stays = self.look(tokens.visual_attention[0].cpu(), tokens.text_attention[0].cpu())
        indices = stays.nonzero().flatten()[None].to(tokens.features.device)
        return KeptTokens(gather_tokens(tokens.features, indices), indices)


@torch.inference_mode()
def send(model, image_processor, prompt: Prompt, look: Look) -> None:
    """Run a prompt through an unpruned model's decoder, in which ``look`` decides what stays after each attention.

    The text's attention is averaged over the text tokens after the image here. A ValueError names the sample if the
    prompt cannot be used, and the layer if its attention contains NaN.
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
        return look(layer, visual, text / prompt.text_after)

    pixels = process_images([prompt.image], image_processor, model.config)
    schedule = tuple((layer, 1.0) for layer in range(1, model.config.num_hidden_layers + 1))
    model.active_pruner = ActivePruner(Observer(look=next_layer), schedule)
    try:
        model(
            input_ids=prompt.input_ids[None].to(model.device),
            images=images_to(pixels, model.device, model.dtype),
            image_sizes=[prompt.image.size],
            logits_to_keep=1,
            use_cache=False,
        )
    except ValueError as error:
        raise ValueError(f"image {prompt.name}: {error}") from None
    finally:
        model.active_pruner = ActivePruner()
