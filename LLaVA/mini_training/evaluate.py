"""How well a llava-mini answers: accuracy by kind of question on validation scenes, and without seeing them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from llava.files import write_json
from llava.mini.pages import PAGES
from llava.model.builder import load_pretrained_model
from mini_training.decoder import ConversationTask
from mini_training.packing import Mixture, PackedScenes, collate
from mini_training.reading import PackedPages, Reading

GREY = 128
SCENE_SORTS = {
    "open": Mixture(questions=20, choice_percent=0, dense_percent=0),
    "plain": Mixture(questions=20, choice_percent=0, plain_percent=100, dense_percent=0),
    "choice": Mixture(questions=20, choice_percent=100, dense_percent=0),
    "pair": Mixture(questions=10, pair_every=1),
    "text": Mixture(questions=10, text_every=1),
}
PAGE_SORTS = {kind: Reading([{"until": 1, "pages": {kind: 1}}], questions=12) for kind in PAGES}


@torch.inference_mode()
def accuracy_by_form(
    task: ConversationTask, data: PackedScenes | PackedPages, grey: bool = False, batch: int = 4
) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each form.

    An answer is right when each of its tokens is the likeliest after the ones before it: exactly those that greedy
    decoding gives word for word. ``grey`` shows a grey image instead.
    """
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for start in range(0, len(data), batch):
        examples = [data[number] for number in range(start, min(start + batch, len(data)))]
        if grey:
            examples = [replace(example, images=np.full_like(example.images, GREY)) for example in examples]
        (packed,) = collate(examples)
        logits, labels, segments, rows = task.answer_logits(packed)
        wrong = torch.zeros(len(examples), int(segments.max()) + 1)
        wrong.index_put_((rows, segments), (logits.argmax(-1) != labels).float(), accumulate=True)
        for row, example in enumerate(examples):
            for number, form in enumerate(example.forms, start=1):
                counts[form][0] += int(wrong[row, number] == 0)
                counts[form][1] += 1
    return {form: (right, asked) for form, (right, asked) in sorted(counts.items())}


def evaluate(checkpoint: Path, scenes: int, report: Path, sorts: Mapping[str, Mixture | Reading] = SCENE_SORTS) -> dict:
    """Print and write accuracies of a checkpoint on so many validation scenes or pages, seen and grey.

    ``sorts`` is what is asked: `SCENE_SORTS` or `PAGE_SORTS`. ``report`` is JSON: sort of question -> form ->
    ``{"asked", "right", "grey"}`` (the latter two as shares).
    """
    tokenizer, model, _, _ = load_pretrained_model(
        str(checkpoint), None, "llava-mini", device="cpu", torch_dtype=torch.float32, attn_implementation="sdpa"
    )
    task = ConversationTask(model)
    result: dict[str, dict] = {}
    for sort, mixture in sorts.items():
        if isinstance(mixture, Reading):
            data = PackedPages("validation", 0, -(-scenes // 4), mixture, tokenizer)
        else:
            few = scenes // 4 if sort in ("pair", "text") else scenes
            data = PackedScenes("validation", 0, few, 4, mixture, tokenizer)
        seen, grey = accuracy_by_form(task, data), accuracy_by_form(task, data, grey=True)
        result[sort] = {
            form: {"asked": n, "right": round(right / n, 4), "grey": round(grey[form][0] / n, 4)}
            for form, (right, n) in seen.items()
        }
        print(f"{sort:18}{'asked':>7}{'right':>8}{'grey':>8}")
        for form, row in result[sort].items():
            print(f"  {form:16}{row['asked']:7}{row['right']:8.3f}{row['grey']:8.3f}")
        total = sum(row["asked"] for row in result[sort].values())
        means = [sum(row["asked"] * row[key] for row in result[sort].values()) / total for key in ("right", "grey")]
        print(f"  {'all':16}{total:7}{means[0]:8.3f}{means[1]:8.3f}")
    write_json(report, result)
    return result
