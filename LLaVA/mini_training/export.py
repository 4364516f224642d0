"""Write llava-mini as a LLaVA-1.5 checkpoint folder."""

from __future__ import annotations

import copy
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from llava.files import write_json
from llava.mini.scenes import IMAGE_SIZE
from llava.mini.seeded_random import WORLD_VERSION
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import PublishedNames
from mini_training.decoder import TOWER_FOLDER
from mini_training.tower import IMAGE_MEAN, IMAGE_STD


def export_tower(tower: CLIPVisionModel, folder: Path) -> None:
    """Write the tower and its image processor to ``folder / "vision_tower"``, in float16.

    The layer after the one that LLaVA reads was never trained; it becomes a copy of its predecessor, so that methods
    that look at its attention see something that makes sense.
    """
    tower = copy.deepcopy(tower)
    layers = tower.encoder.layers
    layers[-1].load_state_dict(layers[-2].state_dict())
    weights = PublishedNames(tower.half()).state_dict()
    tower.save_pretrained(folder / TOWER_FOLDER, state_dict=weights)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    processor.save_pretrained(folder / TOWER_FOLDER)


def export_checkpoint(model: LlavaLlamaForCausalLM, run: Path, config: dict, base: str | None = None) -> None:
    """Write configuration, weights and ``training.json`` beside the tokenizer and tower in ``run / "checkpoint"``.

    ``run`` is the run's folder, with the stages' states, and ``base`` the model that it went on from, if any.
    """
    folder = run / "checkpoint"
    settings = copy.deepcopy(model.config)
    settings.architectures = [type(model).__name__]
    settings.dtype = torch.float16
    settings.save_pretrained(folder)
    weights = {
        name: value.half().contiguous() for name, value in model.state_dict().items() if ".vision_tower." not in name
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 2048}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "training.json", training_record(run, config, base))


def training_record(run: Path, config: dict, base: str | None = None) -> dict:
    """What was trained: steps, images and time of each stage, machine, versions, world and recipe."""
    stages = {}
    for name, settings in config["stages"].items():
        if (run / f"{name}.pt").exists():
            state = torch.load(run / f"{name}.pt", map_location="cpu", weights_only=True)
            stages[name] = {
                "steps": state["step"],
                "of": settings["steps"],
                "images": state["step"] * settings["batch"],
                "minutes": round(state["seconds"] / 60, 1),
            }
    return {
        **({"base": base} if base else {}),
        "world": WORLD_VERSION,
        "seed": config["seed"],
        "stages": stages,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "sentencepiece")},
        "recipe": config | {"stages": {name: config["stages"][name] for name in stages}},
    }
