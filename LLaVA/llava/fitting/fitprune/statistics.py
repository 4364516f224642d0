"""What a model pays attention to over samples: a few numbers per sample, kept on the disk, and one image at a time.

Three kinds of passes go over the samples: one unpruned, for what visual tokens receive in every layer; one for each
alpha that a search visits; one for what a recipe loses. A pass writes its rows every few seconds; stopped at any time,
it continues where it was and ends in the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import benchmark_conv_mode, check_conv_mode, conv_templates, image_mark
from llava.files import atomic_write, cache_folder, write_json
from llava.fitting.data import Source, digest_of
from llava.fitting.fitprune.search import Walk, kept_by
from llava.mm_utils import get_model_name_from_path, images_to, process_images, tokenizer_image_token
from llava.model.active_pruner import ActivePruner
from llava.pruning.base import INSIDE, Pruner
from llava.pruning.methods.fitprune.pruner import deletable, importance
from llava.pruning.methods.fitprune.recipe import model_fingerprint
from llava.pruning.schedule import kept_count
from llava.pruning.tokens import KeptTokens, VisualTokens, gather_tokens

VERSION = 2
"""Of what the rows mean: a new one makes them anew."""

SECONDS_BETWEEN_SAVES = 10.0

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
    """A source's questions as a model is asked them, without an answer.

    Parameters
    ----------
    source : Source
    tokenizer
    config
        The model's.
    conversation : str, optional
        A name of `llava.conversation.conv_templates`; default: the one that benchmarks ask this model with.
    """

    def __init__(self, source: Source, tokenizer, config, conversation: str | None = None):
        check_conv_mode(conversation)
        name = get_model_name_from_path(getattr(config, "name_or_path", ""))
        self.source, self.conversation = source, conversation or benchmark_conv_mode(name, config, tokenizer)
        self._tokenizer, self._mark = tokenizer, image_mark(config)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Prompt:
        """Open one.

        Raises
        ------
        OSError
            If the image cannot be read.
        ValueError
            If nothing is asked; both name the sample.
        """
        name = self.source.names[number]
        image, question = self.source.open(number)
        if not question.strip():
            raise ValueError(f"image {name}: nothing is asked; FitPrune reads what the question attends to")
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


class Statistics:
    """A model's attention over prompts, gathered when it is first asked for.

    Parameters
    ----------
    model
        A loaded LLaVA, unpruned.
    image_processor
    prompts : Prompts
    root : Path
        The numbers get a folder of their own below it, by model and prompts; ``about.json`` there names both.
    """

    def __init__(self, model, image_processor, prompts: Prompts, root: Path):
        self.model, self.image_processor, self.prompts = model, image_processor, prompts
        self.layers: int = model.config.num_hidden_layers
        self.metadata = {
            "version": VERSION,
            "model": model_fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "data": prompts.metadata(),
        }
        self.folder = root / digest_of(self.metadata)

    def unpruned(self) -> np.ndarray:
        """What an image's visual tokens receive in all, in every layer of the unpruned model.

        Returns
        -------
        ndarray (S, L, 2), float64
            From the visual tokens and from the text after the image, both averaged over those that pay.

        Raises
        ------
        OSError, ValueError
            If a sample cannot be used; the message names it.
        """
        return self._unpruned()[:, :-1].reshape(-1, self.layers, 2)

    def text_tokens(self) -> float:
        """Mean number of text tokens of a prompt."""
        return float(self._unpruned()[:, -1].mean())

    def walk(self, alpha: float) -> Walk:
        """What is left after each layer if all drop what is `deletable` at ``alpha``."""
        unpruned = self.unpruned()

        def observe(number: int, prompt: Prompt) -> list[float]:
            kept: list[int] = []

            def look(layer: int, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                stays = ~deletable(visual, text, tuple(unpruned[number, layer].tolist()), alpha)
                kept.extend([int(stays.sum())] if kept else [len(stays), int(stays.sum())])
                return stays

            self._send(prompt, look)
            return kept

        rows = self._pass(f"walk-{alpha:.8g}", observe).astype(np.int64)
        return Walk(len(rows), rows.sum(0).tolist(), np.square(rows).sum(0).tolist())

    def divergence(self, deleted: Sequence[int], tokens: int) -> dict[str, list[float]]:
        """What a recipe, applied as it will be, takes away from the attention over visual tokens.

        Parameters
        ----------
        deleted : sequence of int
            Tokens that leave in each layer, of ``tokens``.

        Returns
        -------
        dict
            "visual" and "text", one number per layer: the share of what the unpruned model's visual tokens receive
            which those that are left do not (0 where they receive more), averaged over the samples.
        """
        unpruned = self.unpruned()
        fractions = [n / tokens for n in kept_by(deleted, tokens)]

        def observe(number: int, prompt: Prompt) -> list[float]:
            total, lost = 0, []

            def look(layer: int, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                nonlocal total
                total = total or len(visual)
                order = importance(visual, text).argsort(descending=True, stable=True)
                stays = torch.zeros_like(visual, dtype=torch.bool)
                stays[order[: kept_count(total, fractions[layer + 1])]] = True
                for now, before in zip((visual, text), unpruned[number, layer].tolist(), strict=True):
                    lost.append(max(0.0, 1 - _sum(now[stays]) / before) if before else 0.0)
                return stays

            self._send(prompt, look)
            return lost

        means = self._pass(f"recipe-{digest_of(list(deleted), tokens)}", observe).mean(0).reshape(self.layers, 2)
        return {"visual": means[:, 0].tolist(), "text": means[:, 1].tolist()}

    def _unpruned(self) -> np.ndarray:
        def observe(number: int, prompt: Prompt) -> list[float]:
            sums: list[float] = []

            def look(layer: int, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                sums.extend((_sum(visual), _sum(text)))
                return torch.ones_like(visual, dtype=torch.bool)

            self._send(prompt, look)
            return [*sums, prompt.text]

        return self._pass("unpruned", observe)

    def _send(self, prompt: Prompt, look: Look) -> None:
        send(self.model, self.image_processor, prompt, look)

    def _pass(self, name: str, observe: Callable[[int, Prompt], list[float]]) -> np.ndarray:
        """What ``observe`` makes of every prompt: (S, ...), float64; those on the disk are not sent again."""
        file = self.folder / f"{name}.npy"
        rows = np.load(file).tolist() if file.is_file() else []
        if not rows:
            write_json(self.folder / "about.json", self.metadata)

        def write(part: Path) -> None:
            with part.open("wb") as stream:
                np.save(stream, np.array(rows, dtype=np.float64))

        count, saved = len(self.prompts), time.monotonic()
        with tqdm(total=count, initial=len(rows), desc=f"FitPrune, {name}", unit="sample", disable=None) as bar:
            for number in range(len(rows), count):
                rows.append(observe(number, self.prompts[number]))
                bar.update()
                if number + 1 == count or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    atomic_write(file, write)
                    saved = time.monotonic()
        return np.array(rows, dtype=np.float64)


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

    The text's attention is averaged over the text tokens after the image here.

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


def cache_root() -> Path:
    """``otprune/fitprune`` in the user's cache folder."""
    return cache_folder().absolute() / "fitprune"


def _sum(attention: torch.Tensor) -> float:
    return float(attention.double().sum())
