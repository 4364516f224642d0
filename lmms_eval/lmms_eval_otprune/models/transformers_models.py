"""lmms-eval's own wrappers of transformers' models, with the pruning that the environment specifies.

A wrapper is subclassed when lmms-eval loads it; without ``BASELINE`` the subclass changes nothing. In the runner it
goes from row to row and records its answers on disk.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import groupby
from typing import Any

import torch
from lmms_eval import models as registry
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from transformers import PreTrainedModel

from llava.adapters.transformers import FAMILIES, Session, set_pruning
from llava.flops import ModelShape
from llava.flops.families import crops_seen, family_shape
from llava.pruning import PruningConfig
from llava.pruning.schedule import kept_after_attention
from lmms_eval_otprune.models import cache_key
from lmms_eval_otprune.models.answers import Answer, Question, count_repeats
from lmms_eval_otprune.models.exit_status import fail_loudly
from lmms_eval_otprune.models.families import WRAPPERS
from lmms_eval_otprune.models.fingerprint import model_fingerprint
from lmms_eval_otprune.models.rows import RowsInTurn
from lmms_eval_otprune.models.token_counts import ImageCount, PromptCount

KINDS = {"simple": "AVAILABLE_SIMPLE_MODELS", "chat": "AVAILABLE_CHAT_TEMPLATE_MODELS"}


def manifests() -> list[ModelManifest]:
    """The wrappers that this release of lmms-eval has, under their own ids: task settings are chosen by id."""
    return [
        ModelManifest(
            model_id=name,
            **{
                f"{kind}_class_path": f"{__name__}.{kind}_{name}" if name in getattr(registry, known) else None
                for kind, known in KINDS.items()
            },
        )
        for name in WRAPPERS
        if any(name in getattr(registry, known) for known in KINDS.values())
    ]


def load(name: str, pretrained: str, device: str | None, dtype: str, batch_size: int) -> RowsInTurn:
    """A wrapper's model, unpruned, for the runner.

    Parameters
    ----------
    name : str
        Of `WRAPPERS`.
    pretrained : str
        A folder or Hub id.
    device : str or None
        None: a GPU, this process's own.
    dtype : str
        Floating type, where the wrapper leaves the choice.
    batch_size : int
    """
    kind = "chat" if name in registry.AVAILABLE_CHAT_TEMPLATE_MODELS else "simple"
    wrapper = pruned_wrapper(kind, name)
    settings = {"device": device or "cuda", "dtype": dtype}
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        settings["device_map"] = device or "cuda"
    known = inspect.signature(wrapper.wrapped).parameters
    lm = wrapper(
        pretrained=pretrained,
        batch_size=batch_size,
        **{name: value for name, value in settings.items() if name in known},
    )
    for attribute in ("_image_processor", "processor"):
        if attribute in vars(lm):
            setattr(lm, attribute, TextAlone(vars(lm)[attribute]))
    lm.loaded_fingerprint = model_fingerprint(pretrained, None, dtype, "sdpa", f"{kind}_{name}")
    return lm


def __getattr__(attribute: str) -> type:
    kind, _, name = attribute.partition("_")
    if kind not in KINDS or name not in WRAPPERS:
        raise AttributeError(attribute)
    return pruned_wrapper(kind, name)


@cache
def pruned_wrapper(kind: str, name: str) -> type[PrunedWrapper]:
    """The subclass of lmms-eval's wrapper ``name``, of the kind "simple" or "chat"."""
    path = registry._build_class_path(name, kind, getattr(registry, KINDS[kind])[name])
    module, _, cls = path.rpartition(".")
    with _video_reader():
        wrapped = getattr(importlib.import_module(module), cls)
    return type(cls, (PrunedWrapper, wrapped), {"__module__": __name__, "wrapped": wrapped, "conv_template": name})


class PrunedWrapper(RowsInTurn):
    """The mixin that a wrapper of lmms-eval is subclassed with."""

    wrapped: type
    loaded_fingerprint: str

    def __init__(self, *args: Any, **kwargs: Any):
        config = PruningConfig.from_env()  # a wrong switch is refused before any weight is read
        super().__init__(*args, **kwargs)
        self.pruning: PruningConfig | None = None
        self._session: Session | None = None
        if config is not None:
            fail_loudly()
            self.set_pruning(config)
            if self.pruning is not None:
                cache_key.extend_with(self.pruning.fingerprint())
                logger.info(f"{self.conv_template}: {self.pruning.describe()}")

    def set_pruning(self, config: PruningConfig | None) -> None:
        """Prune from now on as ``config`` says; None: not at all."""
        self._session = set_pruning(self.model, config)
        self.pruning = None if self._session is None else self._session.config

    def start_run(self, resume_dir: str, writer: int | None = None) -> None:
        """Open the log of answers, as `lmms_eval_otprune.models.llava.Llava.start_run`."""
        self._start(resume_dir, self.rank if writer is None else writer, self.loaded_fingerprint, self.pruning)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def generate_until(self, requests: Sequence[Instance]) -> list[Any]:
        if self.model_fingerprint:  # the runner has called `start_run`
            return self._resumed(requests, super().generate_until)
        answers = super().generate_until(requests)
        self._report()
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        answers = super().loglikelihood(requests)
        self._report()
        return answers

    def _report(self) -> None:
        """Log how much was kept, or raise what ``generate`` raised: several wrappers only log that and go on."""
        if self._session is None:
            return
        if self._session.error is not None:
            raise RuntimeError(f"{self.conv_template}: {self._session.error}") from self._session.error
        images, total, kept = (self._session.seen[name] for name in ("images", "total", "kept"))
        if images:
            logger.info(
                f"{self.conv_template}: kept {kept / images:.1f} of {total / images:.1f} visual tokens per image "
                f"({100 * kept / total:.1f} %), {images} images"
            )

    def _resumed(self, requests: Sequence[Instance], ask: Callable[[list[Instance]], list[Any]]) -> list[str]:
        """Answer batch by batch, reusing recorded answers."""
        questions = count_repeats(map(_question, requests))

        def answer(todo: Mapping[int, Question]) -> Iterator[tuple[list[int], list[Answer]]]:
            for batch in _batches(todo, self.batch_size):
                with _watched(self.model) as calls:
                    texts = ask([_untouched(requests[i]) for i in batch])
                # The wrapper may have reordered the rows of a batch; the sums of their counts are right.
                yield batch, list(map(_answer, texts, [prompt for call in calls for prompt in self._prompts(*call)]))

        return ["" if one is None else one.text for one in self._answer_all(questions, answer)]

    def _prompts(self, ids: torch.Tensor, mask: torch.Tensor, sizes: torch.Tensor | None) -> list[PromptCount]:
        """Text and visual tokens of the prompts (B, T), whose images have these sizes."""
        marks = (ids == self.model.config.image_token_id) & mask
        images = iter(self._image_counts(marks, sizes))
        prompts = []
        for visual, whole in zip(marks.sum(dim=1).tolist(), mask.sum(dim=1).tolist(), strict=True):
            own: list[ImageCount] = []
            while sum(image.total for image in own) < visual:
                own.append(next(images))
            prompts.append(PromptCount(whole - visual, tuple(own)))
        return prompts

    def _image_counts(self, marks: torch.Tensor, sizes: torch.Tensor | None) -> list[ImageCount]:
        layers = self.model.config.get_text_config().num_hidden_layers
        session, after = self._session, None
        if session is None:  # neighbouring placeholders are one image
            totals = [len(list(run)) for row in marks.tolist() for visual, run in groupby(row) if visual]
            seen = [[total] * layers for total in totals]
        else:
            totals, seen = [total for total, _ in session.visual_token_counts], session.visual_tokens_per_layer
            if session.inside is not None and session.pruner.after_attention:
                count = session.pruner.kept_count
                after = [kept_after_attention(session.schedule, total, layers, count) for total in totals]
        shape = self._shape
        crops = [1] * len(totals) if shape is None else crops_seen(self.model.config, shape, totals, sizes)
        return [ImageCount.of(*image) for image in zip(totals, seen, crops, after or seen, strict=True)]

    def model_shape(self) -> ModelShape | None:
        """What the prefills' cost follows from; None for a model whose cost cannot be counted."""
        return self._shape

    @cached_property
    def _shape(self) -> ModelShape | None:
        if self.model.config.model_type not in FAMILIES:
            return None
        try:
            return family_shape(self.model.config)
        except Exception as error:  # a figure in a table is not worth a run
            logger.warning(f"{self.conv_template}: the prefill's FLOPs are not counted: {error}")
            return None


class TextAlone:
    """A processor that accepts an empty list of images, which wrappers pass for a question without images."""

    def __init__(self, processor: Any):
        self._processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._processor(*args, **{name: None if value == [] else value for name, value in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


def _answer(text: str | GenerationResult, prompt: PromptCount) -> Answer:
    counts = text.token_counts if isinstance(text, GenerationResult) else None
    entering = prompt.text + sum(image.entering for image in prompt.images)
    output = (counts and counts.output_tokens) or 0
    return Answer(text.text if isinstance(text, GenerationResult) else text, entering, output, prompt.images)


def _question(request: Instance) -> Question | None:
    """From a simple or chat request, whose arguments differ in order; None for a padding request."""
    if request.metadata.get("__padding_only__"):
        return None
    prompt, *either, doc_id, task, split = request.args
    [settings] = [part for part in either if isinstance(part, dict)]
    seed = torch.initial_seed() if settings.get("do_sample") or settings.get("temperature") else None
    return Question(task, split, doc_id, 0, prompt, dict(sorted(settings.items())), seed)


def _untouched(request: Instance) -> Instance:
    """A copy of a request, because wrappers modify its settings."""
    request = copy.copy(request)
    request.arguments = tuple(dict(part) if isinstance(part, dict) else part for part in request.args)
    return request


def _batches(todo: Mapping[int, Question], size: int) -> Iterator[list[int]]:
    """Batches of consecutive requests of one task and settings."""
    for _, group in groupby(todo, key=lambda i: (todo[i].task, todo[i].split, todo[i].settings)):
        several = list(group)
        for start in range(0, len(several), size):
            yield several[start : start + size]


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]]:
    """Collects ids, mask, both (B, T), and images' sizes of every call of ``generate``; re-raises the first error."""
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    errors: list[Exception] = []
    generate = model.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        try:
            made = generate(*args, **kwargs)
        except Exception as error:
            errors.append(error)
            raise
        whole = torch.ones_like(ids, dtype=torch.bool)
        calls.append((ids, whole if mask is None else mask.bool(), kwargs.get("image_sizes")))
        return made

    model.generate = watched
    try:
        yield calls
    finally:
        del model.generate
    if errors:
        raise errors[0]


@contextmanager
def _video_reader() -> Iterator[None]:
    """Some wrappers import decord, a video reader; a placeholder will do, as no benchmark here has videos."""
    if "decord" in sys.modules or importlib.util.find_spec("decord") is not None:
        yield
        return
    sys.modules["decord"] = placeholder = types.ModuleType("decord")
    vars(placeholder).update(VideoReader=None, cpu=None)
    try:
        yield
    finally:
        del sys.modules["decord"]
