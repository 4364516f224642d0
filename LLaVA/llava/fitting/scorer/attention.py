"""A folder of encoder features and of the attention that a question pays them in the decoder, a file per image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from llava.files import atomic_write, read_json, write_json
from llava.fitting.prompts import Prompt, Prompts, send
from llava.mm_utils import images_to, process_images
from llava.model.image_tokens import image_tokens
from llava.pruning.base import Pruner
from llava.pruning.methods.fitprune.recipe import model_fingerprint

DESCRIPTION = "attention.json"


def gather(model, image_processor, prompts: Prompts, folder: Path, name: str) -> None:
    """Write a file per prompt; those that are there stay, so the same call continues where it was.

    The model, of this ``name``, is a loaded LLaVA, unpruned. An OSError or ValueError if a prompt cannot be used, or
    the folder holds what another model attends to, or other prompts.
    """
    described = {
        "model": {"name": name, "weights": model_fingerprint(model), "width": model.get_vision_tower().hidden_size},
        "data": prompts.metadata(),
    }
    found = read_json(folder / DESCRIPTION)
    if found not in (None, described):
        raise ValueError(f"{folder} holds the attention of another model, or other data: give another --output")
    write_json(folder / DESCRIPTION, described)
    for number in tqdm(range(len(prompts)), desc="attention", unit="image", disable=None):
        file = sample_file(folder, number)
        if not file.exists():
            prompt = prompts[number]
            tensors = {
                "features": encoder_features(model, image_processor, prompt).to(torch.float16).cpu().contiguous(),
                "attention": text_attention(model, image_processor, prompt),
            }
            atomic_write(file, partial(save_file, tensors))


def sample_file(folder: Path, number: int) -> Path:
    """Where a prompt's tensors are."""
    return folder / f"{number:06d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Features(Pruner):
    """Asks the model for the encoder's features, and for nothing else."""

    needs: ClassVar[frozenset[str]] = frozenset({"encoder_features"})


@torch.inference_mode()
def encoder_features(model, image_processor, prompt: Prompt) -> torch.Tensor:
    """The encoder's features of an image's visual tokens, zeros for newline tokens: (N, C)."""
    pixels = images_to(process_images([prompt.image], image_processor, model.config), model.device, model.dtype)
    (image,) = image_tokens(model, pixels, [prompt.image.size], Features())
    return image.signals["encoder_features"]


def text_attention(model, image_processor, prompt: Prompt) -> torch.Tensor:
    """The share of the text's attention that goes to each visual token, averaged over the layers: (N,), sum 1."""
    shares: list[torch.Tensor] = []

    def look(layer: int, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        shares.append(text.double() / text.double().sum())
        return torch.ones_like(text, dtype=torch.bool)

    send(model, image_processor, prompt, look)
    return torch.stack(shares).mean(dim=0).float()


class Attention(torch.utils.data.Dataset):
    """What `gather` wrote: (features (N, C), attention (N,)), float32, by number.

    An OSError if the folder holds none, or a file is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.description = folder, read_json(folder / DESCRIPTION)
        if self.description is None:
            raise OSError(f"{folder} holds no attention: it has no {DESCRIPTION} (llava scorer gather writes it)")

    def __len__(self) -> int:
        return self.description["data"]["samples"]

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        file = sample_file(self.folder, number)
        try:
            tensors = load_file(file)
        except FileNotFoundError:
            raise OSError(f"{self.folder} is not complete: run gather again, it continues where it was") from None
        except SafetensorError as error:
            raise OSError(f"Cannot read {file}: {error}") from error
        return tensors["features"].float(), tensors["attention"]
