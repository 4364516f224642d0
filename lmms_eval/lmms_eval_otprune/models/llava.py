"""The lmms-eval model ``llava``: our LLaVA, with the pruning that the environment specifies."""

from __future__ import annotations

import copy
import inspect
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from PIL import Image
from transformers import PreTrainedModel

from llava.benchmarks import benchmark_of
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import benchmark_conv_mode, conv_templates, image_mark
from llava.mm_utils import AnswerEnd, get_model_name_from_path, images_to, process_images
from llava.model.builder import announce_pruning, load_pretrained_model, resolve_model_path
from llava.model.language_model.kv_cache import CACHE
from llava.model.multimodal_encoder.observations import FEATURES, encoder_outputs
from llava.model.visual_cache import VisualCache, VisualStore, encoder_fingerprint, identify
from llava.pruning import PruningConfig
from lmms_eval_otprune.models import cache_key, java
from lmms_eval_otprune.models.answers import Answer, Question, count_repeats
from lmms_eval_otprune.models.command_line import started_from_command_line
from lmms_eval_otprune.models.exit_status import fail_loudly
from lmms_eval_otprune.models.fingerprint import model_fingerprint
from lmms_eval_otprune.models.group import join
from lmms_eval_otprune.models.prefetch import prefetch
from lmms_eval_otprune.models.prompts import (
    Row,
    conversation,
    make_row,
    pad_left,
    shared_beginning,
    text_tokens,
)
from lmms_eval_otprune.models.rows import RowsInTurn
from lmms_eval_otprune.models.settings import GenerationSettings, read_batch_size, read_dtype, read_visual_cache
from lmms_eval_otprune.models.token_counts import ImageCount, describe, layer_runs, summary

if TYPE_CHECKING:
    from llava.flops import ModelShape

Pixels = torch.Tensor | list[torch.Tensor]
GREY = (128, 128, 128)
VISUAL_CACHE = 2**30
"""Default size in bytes of the in-memory cache: 910 images of LLaVA-1.5 in half precision."""


@dataclass(frozen=True)
class _Pending:
    """A request without an answer."""

    position: int
    question: Question
    images_of: Callable[[Any], list[Image.Image] | None]


@dataclass(frozen=True)
class _Prepared:
    """A batch's prompts and pixels, ready for the device."""

    rows: list[Row]
    pixels: Pixels | None
    settings: GenerationSettings


@dataclass(frozen=True)
class _Seen:
    """A question that was prepared before, and what its encoded images are stored by."""

    row: Row
    images: tuple[Hashable, ...]


class Llava(RowsInTurn):
    """LLaVA for lmms-eval, one process a device.

    The pruning switch (``BASELINE``, ``SUBSET_RATIO``, ``LAYER_INDEX``) is read from the environment and checked before
    any weight is loaded. Answers do not depend on the batch size or on the number of processes.

    Parameters
    ----------
    pretrained : str
        A checkpoint folder, a Hub id, or "llava-mini".
    model_base : str, optional
        The language model that a projector-only or LoRA checkpoint is put on.
    model_name : str, optional
        Determines how the checkpoint is read; default: the last part of ``pretrained``.
    batch_size : int or str
        Prompts per batch.
    device : str, optional
        Default: accelerate's choice for this process.
    device_map : str, optional
        "auto" spreads the model over several GPUs (one process only); anything else is an alias of ``device``.
    dtype : str
        "auto" (float32 on a CPU, float16 on a GPU), float32, float16 or bfloat16; images get the same.
    attn_implementation : str
        sdpa, eager or flash_attention_2.
    conv_template : str
        A name of `llava.conversation.conv_templates`; "auto": the checkpoint's.
    use_cache : bool
        Use the KV cache.
    resume_dir : str, optional
        Folder in which answers are recorded, each before the next batch starts, and from which they are reused.
    grey_pictures : bool
        Replace every image by a grey one of its size, to measure what can be answered without seeing.
    visual_cache : int or str
        Bytes for encoded images that may come again (see `llava.model.visual_cache`), or "off".
    visual_cache_folder : str, optional
        Store them there, shared by processes and configurations with the same vision tower; default: in memory.

    Attributes
    ----------
    conv_template : str
        The conversation template in use.

    Raises
    ------
    ValueError
        For an unknown argument or a wrong value, the switch's included.
    """

    def __init__(
        self,
        pretrained: str = "liuhaotian/llava-v1.5-7b",
        model_base: str | None = None,
        model_name: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        conv_template: str = "auto",
        use_cache: bool = True,
        resume_dir: str | None = None,
        grey_pictures: bool = False,
        visual_cache: int | str = VISUAL_CACHE,
        visual_cache_folder: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        self.label = "LLaVA"
        fail_loudly()
        if unknown:
            names = [name for name in inspect.signature(Llava).parameters if name != "unknown"]
            raise ValueError(f"unknown model argument {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")
        # Checked before joining the other processes; the loader reads the switch again.
        PruningConfig.from_env()
        if conv_template not in ("auto", *conv_templates):
            raise ValueError(f"conv_template={conv_template}: allowed are auto, {', '.join(conv_templates)}")
        self._batch_size = read_batch_size(batch_size)
        self._use_cache = use_cache
        cache_bytes = read_visual_cache(visual_cache)

        self.accelerator = join()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self._device = self._choose_device(device, device_map)
        self.dtype = read_dtype(dtype, self._device)

        name = model_name or get_model_name_from_path(pretrained)
        # Held in a tuple: lmms-eval deletes every module that is an attribute of the wrapper when a run ends.
        self._loaded = load_pretrained_model(
            pretrained,
            model_base,
            name,
            device_map="auto" if device_map == "auto" else str(self._device),
            device="cuda" if device_map == "auto" else str(self._device),
            attn_implementation=attn_implementation,
            dtype=self.dtype,
            multimodal=True,
        )
        self.tokenizer.padding_side = "left"
        self.config.tokenizer_padding_side = "left"
        self.model.visual_cache = self._open_cache(cache_bytes, visual_cache_folder)
        if conv_template == "auto":
            conv_template = benchmark_conv_mode(name, self.config, self.tokenizer)
        self.conv_template = conv_template
        self._end = AnswerEnd.of(conv_templates[conv_template], self.tokenizer)
        self._conversation = partial(conversation, conv_template, mark=image_mark(self.config))

        self._loaded_fingerprint = model_fingerprint(
            resolve_model_path(pretrained),
            model_base and resolve_model_path(model_base),
            str(self.dtype).removeprefix("torch."),
            attn_implementation,
            conv_template,
        )
        if model_name:
            # It determines how the checkpoint is read.
            self._loaded_fingerprint += f"/{model_name}"
        self.start_run(resume_dir, grey_pictures)
        self._ignored_settings: set[str] = set()
        self._seen: dict[Hashable | None, _Seen] = {}

    def set_pruning(self, config: PruningConfig | None) -> None:
        """Prune from now on as ``config`` says; None: not at all."""
        self.model.set_pruning(config)
        announce_pruning(self.model)
        self.model.fit_pruning()

    @property
    def pruning(self) -> PruningConfig | None:
        return self.model.pruning

    def start_run(self, resume_dir: str | None = None, grey_pictures: bool = False, writer: int | None = None) -> None:
        """Open the log of answers for the model's current ``pruning``.

        Parameters
        ----------
        resume_dir, grey_pictures
            As of the class.
        writer : int, optional
            Number of the log file that this process appends to; default: its rank.
        """
        self._grey_pictures = grey_pictures
        self._begun: dict[Hashable, tuple[Any, list[ImageCount]]] = {}
        model = f"{self._loaded_fingerprint}/grey" if grey_pictures else self._loaded_fingerprint
        self._start(resume_dir, self._rank if writer is None else writer, model, self.pruning)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Llava:
        """Build from ``--model_args``; on lmms-eval's command line a wrong value ends it with one sentence."""
        try:
            return super().create_from_arg_string(arg_string, additional_config)
        except (ValueError, OSError, ImportError) as error:
            if started_from_command_line():
                raise SystemExit(f"llava: {error}") from error
            raise

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[1]

    @property
    def tokenizer(self):
        return self._loaded[0]

    @property
    def config(self):
        return self.model.config

    @property
    def max_length(self) -> int:
        return self._loaded[3]

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @batch_size.setter
    def batch_size(self, prompts: int) -> None:
        self._batch_size = prompts

    @property
    def device(self) -> torch.device:
        return self._device

    def model_shape(self) -> ModelShape | None:
        from llava.flops import ModelShape

        try:
            return ModelShape.of(self.config, self.model.get_vision_tower().config)
        except ValueError:
            return None

    def visual_cache_counts(self) -> Counter[str]:
        cache = self.model.visual_cache
        return Counter() if cache is None else Counter(hits=cache.hits, misses=cache.misses)

    def clean(self) -> None:
        """Free the memory after a run, unless ``keep_model`` is set."""
        if not self.keep_model:
            self._loaded = ()
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult | str]:
        """Answer every request, greedily unless its settings say otherwise.

        Padding requests, which only fill up a process's share, are answered with an empty text.

        Raises
        ------
        RuntimeError
            Before anything is generated, if a task of the run could not be scored afterwards.
        ValueError
            If a prompt has more ``<image>`` marks than its document has images.
        """
        questions = count_repeats(map(self._question, requests))
        self._check_scorable(Counter(question.task for question in questions if question is not None))
        fresh: list[Answer] = []

        def answer(todo: Mapping[int, Question]) -> Iterator[tuple[list[int], list[Answer]]]:
            pending = [_Pending(i, question, requests[i].args[2]) for i, question in todo.items()]
            for batch, prepared in prefetch(self._prepare, self._batches(pending)):
                answers = self._answer(prepared)
                fresh.extend(answers)
                yield [item.position for item in batch], answers

        started, used, encoding = time.perf_counter(), self.visual_cache_counts(), self._encoding_seconds()
        found = self._answer_all(questions, answer)
        used = self.visual_cache_counts() - used
        self._report_speed(fresh, time.perf_counter() - started, used, self._encoding_seconds() - encoding)
        if self._rank == 0:
            prompts = Counter(answer.prompt for answer in found if answer is not None)
            if counts := summary(prompts, self.model_shape()):
                logger.info(f"{self.label}: {describe(counts)}")
            if used:
                logger.info(f"{self.label}: {used['hits']} of {used.total()} images came from the cache")
        return ["" if answer is None else _result(answer) for answer in found]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Mean negative log-likelihood of each continuation, and whether greedy decoding would give it.

        lmms-eval's multiple choice takes the smallest value, so this is a loss, as in the builtin wrapper. The answer
        is scored at the end of the sequence, so the number of visual tokens before it does not matter.
        """
        results = []
        with self.open_progress(self.label, len(requests), 0) as progress:
            for request in requests:
                padding = request.metadata.get("__padding_only__")
                results.append((0.0, False) if padding else self._score(request))
                progress.update(1)
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "llava answers one round a document: tasks with output_type generate_until_multi_round are not supported"
        )

    def _choose_device(self, device: str | None, device_map: str | None) -> torch.device:
        if device_map == "auto" and self.accelerator.num_processes > 1:
            raise ValueError("device_map=auto spreads one model over all GPUs: it works with one process only")
        wanted = device or (None if device_map == "auto" else device_map)
        if wanted is not None and self.accelerator.num_processes == 1:
            try:
                return torch.device(wanted)
            except RuntimeError:
                raise ValueError(f"device={wanted}: allowed are cpu, cuda, cuda:0, mps and the like") from None
        ours = self.accelerator.device
        # Two processes on a CPU get cpu:0 and cpu:1, which torch does not take everywhere.
        return torch.device("cpu") if ours.type == "cpu" else ours

    def _open_cache(self, max_bytes: int | None, folder: str | None) -> VisualCache | None:
        if max_bytes is None or folder is None:
            return None if max_bytes is None else VisualCache(max_bytes)
        tower, projector = self.model.get_vision_tower(), self.model.get_model().mm_projector
        # Projecting costs little where it makes features wider, which then would take more room.
        projected = self.config.hidden_size <= tower.hidden_size
        fingerprint = encoder_fingerprint(tower, projector if projected else None)
        store = VisualStore(Path(folder) / fingerprint, max_bytes, tower.device)
        store.holds_projected = projected
        return store

    def _question(self, request: Instance) -> Question | None:
        """None for a padding request."""
        if request.metadata.get("__padding_only__"):
            return None
        context, gen_kwargs, _, doc_id, task, split = request.args
        try:
            settings = GenerationSettings.read(gen_kwargs)
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from None
        for name in sorted(settings.ignored - self._ignored_settings):
            logger.warning(f"llava ignores the generation setting {name} of {task}")
            self._ignored_settings.add(name)
        seed = torch.initial_seed() if settings.temperature > 0 else None
        return Question(task, split, doc_id, 0, context, settings.to_dict(), seed)

    def _check_scorable(self, tasks: Counter[str]) -> None:
        """Refuse, before generating, a task whose scoring would fail and lose all other tasks' answers."""
        for task, count in tasks.items():
            if java.needs_java(task) and not java.java_works():
                raise RuntimeError(
                    f"{task} is scored with Java, which is not installed: install it ({java.PACKAGE} on Debian and "
                    "Ubuntu), or leave the task out"
                )
            # With a response cache or several processes, only some of the questions arrive here.
            in_pairs = (benchmark := benchmark_of(task)) is not None and benchmark.in_pairs
            if in_pairs and count % 2 and self._world_size == 1 and not cache_key.in_use():
                raise RuntimeError(f"{task} is scored in pairs of questions: --limit must be even, not {count}")

    def _batches(self, pending: Sequence[_Pending]) -> Iterator[list[_Pending]]:
        """Batches of requests of one task and settings, longest prompts first; on a CPU, of prompts of equal length.

        On a CPU padding costs as much as any token, and a mask disables the fast path of attention. Images without a
        mark in the text are not counted, so such prompts may still be padded.
        """
        groups: dict[str, list[_Pending]] = defaultdict(list)
        for item in pending:
            question = item.question
            groups[repr((question.task, question.split, question.settings))].append(item)
        for group in groups.values():
            lengths = {item.position: self._length(item.question) for item in group}
            group.sort(key=lambda item: lengths[item.position], reverse=True)
            alike = self._device.type == "cpu"
            for _, several in groupby(group, key=lambda item: lengths[item.position] if alike else None):
                part = list(several)
                for start in range(0, len(part), self._batch_size):
                    yield part[start : start + self._batch_size]

    def _length(self, question: Question) -> tuple[int, int]:
        """Image marks in the prompt, and its tokens."""
        return question.prompt.count(DEFAULT_IMAGE_TOKEN), len(self.tokenizer(question.prompt).input_ids)

    def _prepare(self, batch: Sequence[_Pending]) -> _Prepared:
        """Read a batch's images and tokenise its prompts; runs while the device works on the batch before."""
        settings = GenerationSettings(**batch[0].question.settings)
        names = [self._name(item.question) for item in batch]
        if (prepared := self._prepared_before(names, settings)) is not None:
            return prepared
        rows, images = [], list[Image.Image]()
        for item in batch:
            found = self._images(item.question, item.images_of)
            rows.append(self._row(item.question, found))
            images += found[: len(rows[-1].image_sizes)]
        pixels = self._pixels(images, settings.preprocessing(self.config))
        stored = isinstance(self.model.visual_cache, VisualStore) and self._device.type == "cpu"
        if stored and all(names) and isinstance(pixels, torch.Tensor) and pixels.ndim == 4:
            keys = iter(identify(pixels))
            seen = [_Seen(row, tuple(islice(keys, len(row.image_sizes)))) for row in rows]
            self._seen |= zip(names, seen, strict=True)
        return _Prepared(rows, pixels, settings)

    def _name(self, question: Question) -> Hashable | None:
        """What a question's prompt and images depend on; None if its documents have no fingerprint.

        Nor has a question about grey images a name: of those one is enough, and soon prepared.
        """
        documents = self.task_dict[question.task][question.split]
        fingerprint = getattr(documents, "_fingerprint", None)
        about = (question.task, question.split, question.doc_id, question.prompt, repr(question.settings))
        return None if fingerprint is None or self._grey_pictures else (fingerprint, *about)

    def _prepared_before(self, names: Sequence[Hashable | None], settings: GenerationSettings) -> _Prepared | None:
        """A batch that an earlier row was asked: its images are neither read nor prepared, but taken as encoded."""
        pruner = self.model.active_pruner.pruner
        if not all(name in self._seen for name in names) or (pruner is not None and pruner.drop_duplicates):
            return None
        seen = [self._seen[name] for name in names]
        keys = [key for one in seen for key in one.images]
        wanted = dict.fromkeys(output for outputs in encoder_outputs(pruner).values() for output in outputs)
        pixels = self.model.visual_cache.stand_in(keys, (FEATURES, *wanted)) if keys else None
        return None if keys and pixels is None else _Prepared([one.row for one in seen], pixels, settings)

    def _answer(self, batch: _Prepared) -> list[Answer]:
        """Rows with and without images are generated separately, so that no image goes to a row of text."""
        answers: dict[int, Answer] = {}
        for pixels, has_images in ((batch.pixels, True), (None, False)):
            chosen = [i for i, row in enumerate(batch.rows) if bool(row.image_sizes) == has_images]
            if chosen:
                found = self._generate([batch.rows[i] for i in chosen], pixels, batch.settings)
                answers |= zip(chosen, found, strict=True)
        return [answers[i] for i in range(len(batch.rows))]

    def _images(self, question: Question, images_of: Callable[[Any], list[Image.Image] | None]) -> list[Image.Image]:
        """A document's images, decoded; an error names the document."""
        try:
            document = self.task_dict[question.task][question.split][question.doc_id]
            images = [image for image in images_of(document) or () if image is not None]
            for image in images:
                image.load()
        except Exception as error:
            raise ValueError(
                f"{question.task}, document {question.doc_id}: its images cannot be read "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            ) from error
        return [Image.new("RGB", image.size, GREY) for image in images] if self._grey_pictures else images

    def _row(self, question: Question, images: Sequence[Image.Image]) -> Row:
        prompt = self._conversation(question.prompt, len(images))
        try:
            return make_row(self.tokenizer, prompt, images)
        except ValueError as error:
            raise ValueError(f"{question.task}, document {question.doc_id}: {error}") from None

    def _pixels(self, images: Sequence[Image.Image], config: Any) -> Pixels | None:
        """What the vision tower takes, still on the host."""
        return images_to(process_images(images, self._loaded[2], config), "cpu", self.dtype) if images else None

    def _on_device(self, pixels: Pixels | None) -> Pixels | None:
        return None if pixels is None else images_to(pixels, self.device, self.dtype)

    @torch.inference_mode()
    def _generate(self, rows: Sequence[Row], pixels: Pixels | None, settings: GenerationSettings) -> list[Answer]:
        begin = shared_beginning(rows) if self._grey_pictures and self._use_cache and settings.num_beams == 1 else None
        if begin is not None:
            return self._generate_from(begin, rows, pixels, settings)
        input_ids, mask = pad_left(rows, self._pad_token_id())
        generated = self.model.generate(
            input_ids.to(self.device),
            attention_mask=mask.to(self.device),
            images=self._on_device(pixels),
            image_sizes=[size for row in rows for size in row.image_sizes],
            **self._arguments(settings, input_ids),
        )
        return self._answers_of(rows, generated, self._image_counts(pixels))

    def _generate_from(
        self, begin: Row, rows: Sequence[Row], pixels: Pixels | None, settings: GenerationSettings
    ) -> list[Answer]:
        """Answers about grey images: one of a size is like the other, so that prompts begin in the same way."""
        key = (tuple(begin.input_ids.tolist()), begin.image_sizes, settings.image_aspect_ratio)
        if key not in self._begun:
            pixels = None if pixels is None else pixels[: len(begin.image_sizes)]
            output = self.model(
                begin.input_ids[None].to(self.device),
                images=self._on_device(pixels),
                image_sizes=begin.image_sizes,
                use_cache=True,
                logits_to_keep=1,
            )
            self._begun = {key: (output[CACHE], self._image_counts(pixels))}
        cache, counts = self._begun[key]
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(rows))
        input_ids = torch.stack([row.input_ids[len(begin.input_ids) :] for row in rows])
        generated = self.model.generate(
            input_ids.to(self.device), **{CACHE: cache}, **self._arguments(settings, input_ids)
        )
        return self._answers_of(rows, generated, counts * len(rows))

    def _arguments(self, settings: GenerationSettings, input_ids: torch.Tensor) -> dict[str, Any]:
        """Of ``generate``, besides the prompts."""
        rest = {"pad_token_id": self._pad_token_id(), "use_cache": self._use_cache}
        return rest | settings.arguments() | self._end.options(input_ids)

    def _answers_of(
        self, rows: Sequence[Row], generated: torch.Tensor, image_counts: Sequence[ImageCount]
    ) -> list[Answer]:
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        counts = iter(image_counts)
        answers = []
        for row, ids, text in zip(rows, generated.tolist(), texts, strict=True):
            visual_tokens = tuple(next(counts) for _ in row.image_sizes)
            entered = text_tokens(row) + sum(image.entering for image in visual_tokens)
            answers.append(Answer(self._end.cut(text), entered, self._generated_tokens(ids), visual_tokens))
        return answers

    def _image_counts(self, pixels: Pixels | None) -> list[ImageCount]:
        """Visual tokens per decoder layer for each image of the latest call."""
        if pixels is None:
            return []
        totals = [total for total, _ in self.model.visual_token_counts]
        crops = [1 if image.ndim == 3 else len(image) for image in pixels]
        seen, left = self.model.visual_tokens_per_layer, self.model.visual_tokens_after_attention
        return [ImageCount.of(*image) for image in zip(totals, seen, crops, left, strict=True)]

    @torch.inference_mode()
    def _score(self, request: Instance) -> tuple[float, bool]:
        context, target, images_of, doc_id, task, split = request.args
        context = context[0] if isinstance(context, list) else context
        question = Question(task, split, doc_id, 0, context, {})
        images = self._images(question, images_of)
        row = self._row(question, images)
        answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
        images = images[: len(row.image_sizes)]
        whole = self._conversation(context, len(images), answer)
        input_ids = make_row(self.tokenizer, whole, images).input_ids
        continuation = input_ids[len(row.input_ids) :].to(self.device)  # (n,)
        # Only the question influences the selection: visual tokens are the same for every candidate answer.
        labels = input_ids.clone()
        labels[: len(row.input_ids)] = IGNORE_INDEX
        logits = self.model(
            input_ids=input_ids[None].to(self.device),
            labels=labels[None].to(self.device),
            images=self._on_device(self._pixels(images, self.config)),
            image_sizes=row.image_sizes,
            logits_to_keep=len(continuation) + 1,
        ).logits[0, :-1]  # (n, vocabulary)
        loss = torch.nn.functional.cross_entropy(logits.float(), continuation)
        return float(loss), bool((logits.argmax(-1) == continuation).all())

    def _pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _generated_tokens(self, ids: Sequence[int]) -> int:
        ends = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id} | set(ends if isinstance(ends, list) else [ends])
        # Where a text ends the answers, rows that end early are padded.
        written = max((position + 1 for position, token in enumerate(ids) if token != self._pad_token_id()), default=0)
        return next((position + 1 for position, token in enumerate(ids) if token in ends), written)

    def _encoding_seconds(self) -> float:
        return 0.0 if self.model.visual_cache is None else self.model.visual_cache.seconds

    def _report_speed(self, fresh: Sequence[Answer], seconds: float, used: Counter[str], encoding: float) -> None:
        """Report speed and token counts of newly generated answers to lmms-eval."""
        if not fresh:
            return
        generated = sum(answer.output_tokens for answer in fresh)
        images = [image for answer in fresh for image in answer.visual_tokens]
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=generated,
            avg_speed=generated / seconds,
            additional_metrics={
                "total_requests": len(fresh),
                "samples_per_second": len(fresh) / seconds,
                "visual_tokens": sum(image.total for image in images),
                "kept_visual_tokens": sum(image.kept for image in images),
                "encoding_latency": encoding / len(fresh),
                "visual_cache_hits": used["hits"],
                "visual_cache_misses": used["misses"],
                **self._budget_metrics(fresh),
            },
        )

    def _budget_metrics(self, fresh: Sequence[Answer]) -> dict[str, float]:
        """Tokens per layer and relative cost as single numbers, since lmms-eval records nothing else."""
        counts = summary(Counter(answer.prompt for answer in fresh), self.model_shape())
        if counts is None:
            return {}
        layers = {f"visual_tokens_from_layer_{first}": tokens for first, _, tokens in layer_runs(counts["per_layer"])}
        return layers | {f"flops_ratio_{name}": ratio for name, ratio in (counts["flops_ratio"] or {}).items()}


def _result(answer: Answer) -> GenerationResult:
    return GenerationResult(answer.text, TokenCounts(answer.input_tokens, answer.output_tokens))
