"""Requests a second in vLLM's engine, unpruned beside pruned: python tests/serve/measure.py [CONCURRENCY ...]

Run it with the Python of the environment that tests/serve/run.sh makes. The model has llava-mini's tower (576 visual
tokens) and a random decoder of 152 M parameters; every request has an image of its own and 4 new tokens.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
from transformers import AutoProcessor, LlavaForConditionalGeneration

from images_to_serve import noise
from llava.serve.export_hf import main as export
from llava.serve.export_hf import published_name
from served import Served

RATIOS = (1.0, 0.098)
DECODER = {
    "hidden_size": 1024,
    "intermediate_size": 2736,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
}


def checkpoint(folder: Path) -> Path:
    assert export(["llava-mini", str(folder / "mini")]) == 0
    config = LlavaForConditionalGeneration.from_pretrained(folder / "mini").config
    config.text_config.update(DECODER | {"max_position_embeddings": 2048})
    model = LlavaForConditionalGeneration(config)
    weights = {published_name(name): value for name, value in model.state_dict().items()}
    model.save_pretrained(folder / "model", state_dict=weights, save_original_format=False)
    AutoProcessor.from_pretrained(folder / "mini").save_pretrained(folder / "model")
    return folder / "model"


def measure(concurrencies: list[int]) -> None:
    served = Served(
        checkpoint(Path(tempfile.mkdtemp())), max_num_seqs=32, max_num_batched_tokens=2048, disable_log_stats=False
    )
    image = 1000
    served.ask([([noise(0, 336, 336)], "What is it?")])
    print("requests at once, kept ratio, requests/s, TTFT p50 and p95 in s, tokens and KV blocks (32) per prompt")
    for concurrency in concurrencies:
        for ratio in RATIOS:
            rounds = max(1, 4 // concurrency)
            answers, start = [], time.perf_counter()
            for _ in range(rounds):
                images = [noise(image + i, 336, 336) for i in range(concurrency)]
                image += concurrency
                answers += served.ask([([one], "What is in the image?") for one in images], ratio)
            rate = len(answers) / (time.perf_counter() - start)
            p50, p95 = np.percentile([one.ttft for one in answers], [50, 95])
            tokens = answers[0].prompt
            print(f"{concurrency}, {ratio}, {rate:.2f}, {p50:.2f}, {p95:.2f}, {tokens}, {-(-tokens // 32)}", flush=True)


if __name__ == "__main__":
    measure([int(text) for text in sys.argv[1:]] or [1, 8, 32])
