"""Checkpoints of the first generation, whose configuration says that they are a plain Llama."""

from __future__ import annotations

import json
from pathlib import Path

from llava.model.builder import read_config
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM


def auto_upgrade(config: str) -> None:
    """Let ``AutoModel`` find LLaVA in a first-generation checkpoint: rewrite its config.json, after asking.

    `llava.model.builder.load_pretrained_model` reads such a checkpoint as it is; scripts that use ``AutoModel`` do not.

    Parameters
    ----------
    config : str
        The checkpoint's folder. Nothing happens unless its configuration names a vision tower, but not LLaVA.

    Raises
    ------
    OSError
        If there is no such checkpoint.
    ValueError
        If it is no Llama.
    SystemExit
        If the answer is no.
    """
    content = read_config(config)
    model_type = content.get("model_type", "")
    if "mm_vision_tower" not in content or "llava" in model_type:
        return
    if model_type != "llama":
        raise ValueError(
            f"{config} holds model_type {model_type!r}; only a first-generation LLaVA on llama is upgraded"
        )
    print(f"{config} is a checkpoint of the first generation: its config.json has to name LLaVA.")
    if input("Rewrite it now? [y/N] ").strip().lower() not in ("y", "yes"):
        raise SystemExit(1)
    content |= {"model_type": LlavaConfig.model_type, "architectures": [LlavaLlamaForCausalLM.__name__]}
    (Path(config) / "config.json").write_text(json.dumps(content, indent=2) + "\n")
