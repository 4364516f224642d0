"""The recipe of docs/serving.md: a client prunes, and an unmodified vLLM answers as this package's LLaVA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mini.benchmarks.yes_no import pope
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import pruning
from llava.serve.export_hf import main

DOCS = Path(__file__).parents[2] / "LLaVA/docs/serving.md"
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=1, enable_mm_embeds=True)
content = json.load(open(sys.argv[2]))
sampling = SamplingParams(max_tokens=4, temperature=0)
(answer,) = llm.chat([{"role": "user", "content": content}], sampling, use_tqdm=False)
print(json.dumps([answer.outputs[0].text.strip(), len(answer.prompt_token_ids)]))
"""


def test_a_client_may_prune(tmp_path):
    task = pope()[0]
    image, question = task.rows[0]["image"].convert("RGB"), task.prompts[0]
    recipe = {"image": image, "question": question}
    exec(DOCS.read_text().partition("```python\n")[2].partition("```")[0], recipe)
    (tmp_path / "content.json").write_text(json.dumps(recipe["content"]))
    assert main(["llava-mini", str(tmp_path / "served")]) == 0
    environ = {name: value for name, value in os.environ.items() if name not in ("BASELINE", "SUBSET_RATIO")}
    environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SERVE, str(tmp_path / "served"), str(tmp_path / "content.json")]
    output = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=1500)
    assert output.returncode == 0, output.stderr[-3000:]
    found = json.loads(output.stdout.splitlines()[-1])
    assert found == own_answer(image, question)


@torch.inference_mode()
def own_answer(image, question):
    tokenizer, model, processor, _ = load_pretrained_model(
        "llava-mini", None, "llava-mini", device="cpu", dtype=torch.float32
    )
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    pixels = process_images([image], processor, model.config)
    with pruning(model, "visionzip", ratio=0.1):
        found = model.generate(ids[None], images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=4)
    ((_, kept),) = model.visual_token_counts
    return [tokenizer.decode(found[0], skip_special_tokens=True).strip(), len(ids) - 1 + kept]
