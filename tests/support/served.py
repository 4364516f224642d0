"""An engine of vLLM in this process, and what transformers answers to the same conversations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

Conversation = tuple[Sequence[Image.Image], str]
"""The images, then the question."""
NEW = 4
RATIO = 0.25
"""What the engine keeps unless a request names a ratio."""


@dataclass
class Answer:
    """What came of one conversation: ids, log-probabilities of the likeliest first tokens, and counts of tokens."""

    tokens: list[int]
    first: dict[int, float] = field(repr=False)
    prompt: int
    cached: int = 0

    def agrees(self, other: Answer) -> bool:
        """Whether lengths, tokens and log-probabilities are the same; ``other`` may hold more of the last."""
        near = all(abs(value - other.first[token]) < 1e-4 for token, value in self.first.items())
        return near and (self.tokens, self.prompt) == (other.tokens, other.prompt)


class Served:
    """An engine with one model."""

    def __init__(self, folder: Path, **settings: Any):
        # Before the first import of vllm: the engine in this process, and no second guess of this machine's address.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        os.environ |= {"BASELINE": "OTPRUNE", "SUBSET_RATIO": str(RATIO)}
        from vllm import LLM

        defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 4, "seed": 0}
        defaults |= {"block_size": 32, "limit_mm_per_prompt": {"image": 2}, "disable_log_stats": True}
        self.llm = LLM(str(folder), **defaults | settings)

    @property
    def runner(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    @property
    def processor(self) -> Any:
        return self.llm.renderer.get_mm_processor()

    def use(self, method: str, **options: Any) -> None:
        """Prune with another method from now on, as an engine that was started with it would."""
        from llava.adapters.vllm.processor import resolved
        from llava.pruning import PruningConfig

        config = resolved(PruningConfig(method, RATIO, options=options), self.llm.llm_engine.model_config)
        self.runner.model.prune_with(config.build_pruner())
        self.processor.pruning = config

    def ask(self, conversations: Sequence[Conversation], ratio: float | None = None) -> list[Answer]:
        from vllm import SamplingParams

        messages = [
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image_pil", "image_pil": image} for image in images),
                        {"type": "text", "text": question},
                    ],
                }
            ]
            for images, question in conversations
        ]
        own = {} if ratio is None else {"mm_processor_kwargs": {"visual_token_ratio": ratio}}
        sampling = SamplingParams(max_tokens=NEW, temperature=0, logprobs=3, ignore_eos=True)
        return [
            Answer(
                list(one.outputs[0].token_ids),
                {token: value.logprob for token, value in one.outputs[0].logprobs[0].items()},
                len(one.prompt_token_ids),
                one.num_cached_tokens,
            )
            for one in self.llm.chat(messages, sampling, use_tqdm=False, **own)
        ]

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


class Reference:
    """transformers' model of the same folder, pruned by the adapter for transformers."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def ask(
        self, conversations: Sequence[Conversation], method: str, ratio: float = RATIO, **options: Any
    ) -> list[Answer]:
        from llava.pruning import pruning

        answers = []
        for images, question in conversations:
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = self.processor(
                text=[text], images=list(images) or None, add_special_tokens=False, return_tensors="pt"
            )
            with pruning(self.model, method, ratio, **options) as report:
                found = self.model.generate(
                    **inputs,
                    max_new_tokens=NEW,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            whole = inputs["input_ids"].shape[1]
            dropped = sum(total - kept for total, kept in report.visual_token_counts) if images else 0
            first = found.logits[0][0].log_softmax(-1)
            answers.append(
                Answer(found.sequences[0, whole:].tolist(), dict(enumerate(first.tolist())), whole - dropped)
            )
        return answers
