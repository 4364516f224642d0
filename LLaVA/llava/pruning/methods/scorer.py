"""A trained scorer: a small network predicts, from an image's features, what questions attend to in the decoder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from llava.pruning.base import Pruner
from llava.pruning.methods.coverage import facility_select
from llava.pruning.methods.divprune import cosine_similarity
from llava.pruning.methods.trained import CONFIG, WEIGHTS, filled, read_config, read_weights
from llava.pruning.tokens import VisualTokens

MODEL_TYPE = "token_scorer"
EMBEDDED = "llava-mini"
SHIPPED = {EMBEDDED: "scorer", "llava-mini-reader": "reader_scorer"}
"""The model that a scorer ships with the package for -> its folder in ``llava/mini``."""


class TokenScorer(nn.Module):
    """One score per token, from its features, which are of this ``width``, and from their mean over the image."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.width, self.hidden = width, hidden
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, hidden)
        self.token, self.image = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden, bias=False)
        self.score = nn.Linear(hidden, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Scores (B, N) of features (B, N, C); ``-inf`` for those of zeros: newline tokens and padding."""
        inner = nn.functional.gelu(self.project(self.norm(features)))  # (B, N, H)
        present = features.any(dim=-1)
        share = present.to(inner.dtype) / present.sum(dim=1, keepdim=True)
        mean = (inner * share.unsqueeze(-1)).sum(dim=1, keepdim=True)  # (B, 1, H)
        scores = self.score(nn.functional.gelu(self.token(inner) + self.image(mean))).squeeze(-1)
        return scores.masked_fill(~present, -torch.inf)


@dataclass(frozen=True, kw_only=True)
class Scorer(Pruner):
    """A small network, trained once per model, predicts what questions attend to; what is kept covers the image by it.

    It reads the vision encoder's features, and is trained to predict the share of attention that questions pay each
    patch in the decoder, without the question: ``llava scorer gather`` and ``llava scorer train``. Newline tokens go on
    only where the budget exceeds the patches.

    Attributes
    ----------
    checkpoint : str
        A folder of ``llava scorer train``, or "llava-mini" or "llava-mini-reader", which ship with the package for the
        models of these names.
    coverage : bool
        Choose greedily by ``a_j sum_i max(0, cos_ij - m_i)``, as SCOPE does, with the predicted share ``a_j`` as the
        saliency. Otherwise the k patches with the highest prediction are kept, which may all show one thing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"encoder_features"})
    source: ClassVar[str] = "This package: attention in the decoder, predicted from the vision encoder's features"
    cost: ClassVar[str] = "a small network, O(N^2 C), greedy O(k N^2) at most"

    checkpoint: str = EMBEDDED
    coverage: bool = True

    def __post_init__(self):
        try:
            read_scorer_config(self._folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"SCORER_CHECKPOINT={self.checkpoint}: {error}") from None

    @property
    def _folder(self) -> Path:
        path = Path(self.checkpoint)
        if self.checkpoint in SHIPPED and not path.is_dir():
            return Path(__file__).parents[2] / "mini" / SHIPPED[self.checkpoint]
        return path

    def digests(self) -> dict[str, str]:
        whole = hashlib.sha256((self._folder / WEIGHTS).read_bytes())
        return {"checkpoint": whole.hexdigest()[:12]}

    def check_model(self, image_tokens: int | None, encoder_width: int | None) -> None:
        trained = read_scorer_config(self._folder)["width"]
        if encoder_width not in (None, trained):
            raise ValueError(
                f"the scorer {self.checkpoint} reads features of width {trained}, but this vision tower's have "
                f"{encoder_width}: name one that was trained for this model (SCORER_CHECKPOINT)"
            )

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        scores = self.scores(tokens.encoder_features)
        if not self.coverage:
            return scores.argsort(dim=-1, descending=True, stable=True)[:, : tokens.k]
        share = torch.nan_to_num(scores.softmax(dim=-1))  # NaN where an image has no patch
        return facility_select(cosine_similarity(tokens.encoder_features), tokens.k, weight=share)

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, N, C) -> (B, N), float32; one image at a time: in a batch, rounding could tip a choice."""
        stamp = (self._folder / WEIGHTS).stat().st_mtime_ns
        network = _network(self._folder, stamp, str(features.device))
        return torch.cat([network(image[None].float()) for image in features])


def read_scorer_config(folder: Path) -> dict[str, Any]:
    """A scorer's ``config.json``; an OSError or ValueError if there is none, or it describes something else."""
    config = read_config(folder, MODEL_TYPE, "a scorer")
    for name in ("width", "hidden"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise ValueError(f"{folder / CONFIG}: {name} must be a whole number >= 1, not {config.get(name)!r}")
    return config


def load_scorer(folder: Path) -> TokenScorer:
    """The float32 network in a folder, in eval mode; an `OSError` or `ValueError` if it cannot be read."""
    config = read_scorer_config(folder)
    weights = read_weights(folder, "a scorer")
    network = filled(TokenScorer(config["width"], config["hidden"]), weights, str(folder / WEIGHTS))
    return network.requires_grad_(False)


@lru_cache(maxsize=4)
def _network(folder: Path, stamp: int, device: str) -> TokenScorer:
    """Read anew when the file changes: a scorer may be trained again while this process runs."""
    return load_scorer(folder).to(device)
