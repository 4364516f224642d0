"""OC-VTP: keep the tokens that a trained set of object slots attends to most."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llava.pruning.base import Pruner
from llava.pruning.methods.ocvtp.checkpoint import EMBEDDED, PrunerFiles
from llava.pruning.methods.ocvtp.network import slot_noise
from llava.pruning.tokens import VisualTokens


def claims(slot_attention: torch.Tensor, top_k: int) -> torch.Tensor:
    """How strongly each token of an image is claimed, (N,): by the slots that have it among their ``top_k``.

    The largest attention (S, N) of a slot that claims it; ``-inf`` for a token that none claims, or that cannot be
    claimed because its attention is. Ties go to the lowest index.
    """
    left = slot_attention.clone()
    claimed = torch.full_like(left[0], -torch.inf)
    for _ in range(min(top_k, left.shape[1])):
        best, places = left.max(dim=-1)  # (S,) each; of equals the first
        claimed.scatter_reduce_(0, places, best, "amax")
        left.scatter_(1, places.unsqueeze(-1), -torch.inf)
    return claimed


def fill(claimed: torch.Tensor, padding: torch.Tensor | None, k: int) -> torch.Tensor:
    """Claimed tokens first, and others up to the budget: (k,), int64; ties go to the lowest index.

    Parameters
    ----------
    claimed : Tensor (N,)
        From `claims`. Where more than ``k`` tokens are claimed, those go that are claimed least.
    padding : Tensor (N,), or None
        What the others are ranked by, descending; ``-inf`` comes last. None leaves the rest of the budget empty.
    k : int
        1 <= k <= N.

    Source: OC-VTP, arXiv 2511.20439.
    """
    taken = claimed > -torch.inf
    if padding is None:
        return claimed.argsort(descending=True, stable=True)[: min(k, int(taken.sum()))]
    order = torch.where(taken, claimed, padding).argsort(descending=True, stable=True)
    claimed_first = taken[order].int().argsort(descending=True, stable=True)
    return order[claimed_first][:k]


@dataclass(frozen=True, kw_only=True)
class OCVTP(Pruner):
    """A small network, trained once, divides the patches among slots; each slot's most attended patches are kept.

    The network reads the features of one layer of the vision encoder. There are as many slots as the budget allows.
    Several slots may claim the same patch; what is then left of the budget goes to the patches with the most attention
    in the last encoder layer that runs. Newline tokens have no part in it and go on only where the budget exceeds the
    patches. The crops of an anyres image are one set of patches for the slots; with ``per_crop`` each crop has slots of
    its own.

    The slots begin as random draws. The published code draws anew for every image; here the draw is ``seed``'s, so that
    the same image always keeps the same tokens.

    Attributes
    ----------
    checkpoint : str
        The pruner: a folder that ``python -m llava.fitting.ocvtp train`` wrote, a file of the published code, or
        "llava-mini", which ships with the package and fits the model of that name.
    config : str or None
        The published code's configuration file beside its checkpoint; without it the sizes are those of the weights.
    encoder_layer : int or None
        Vision-encoder layer whose output the network reads, 0-based or from the end of those that run; None for the one
        that it was trained on.
    target : int or None
        Tokens kept of every image, instead of a kept ratio.
    top_k : int
        Tokens that a slot claims.
    has_cls : bool
        Give [CLS] a share of the budget where slots are counted, as the published code does: ``(k + 1) // top_k`` slots
        instead of ``k // top_k``. It is never among the kept tokens.
    pad : str
        What fills the budget: "attention", "random" (by seed and content), or "none", which keeps fewer tokens.
    attention : str
        That of all queries ("mean") or of [CLS] ("cls"), averaged over the heads.
    seed : int
        Of the slots' draws, and of random padding.
    """

    source: ClassVar[str] = "OC-VTP, arXiv 2511.20439"
    venue: ClassVar[str] = "arXiv"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "a small network: 0.07 % of a 7B prefill"

    checkpoint: str = EMBEDDED
    config: str | None = None
    encoder_layer: int | None = None
    target: int | None = None
    top_k: int = 1
    has_cls: bool = True
    pad: Literal["attention", "random", "none"] = "attention"
    attention: Literal["mean", "cls"] = "mean"
    seed: int = 0

    def __post_init__(self):
        for name in ("target", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"OC-VTP's {name} must be a whole number >= 1, not {value}")
        if self.target is not None and self.per_crop:
            raise ValueError(f"OC-VTP's target={self.target} is for a whole image: with per_crop give a kept ratio")
        if self.attention == "cls" and not self.has_cls:
            raise ValueError("OC-VTP's attention=cls needs a [CLS] token: has_cls must be 1")
        try:
            trained_layer = self._files.config.layer
        except OSError as error:
            raise ValueError(f"OC-VTP's checkpoint: {error}") from error
        if self._files.path.is_dir() and self.encoder_layer not in (None, trained_layer):
            raise ValueError(
                f"OC-VTP's pruner {self.checkpoint} was trained on layer {trained_layer} of the vision encoder: "
                f"encoder_layer must be that or left out, not {self.encoder_layer}"
            )

    @property
    def _files(self) -> PrunerFiles:
        return PrunerFiles.find(self.checkpoint, self.config)

    def digests(self) -> dict[str, str]:
        return {"checkpoint": self._files.digest}

    @property
    def needs(self) -> frozenset[str]:
        """The features, and what the rest of the budget is ranked by."""
        attention = {"mean": "received_attention", "cls": "cls_attention"}[self.attention]
        padding = {"attention": {attention}, "random": {"image_keys"}, "none": set()}[self.pad]
        return frozenset({"layer_features"} | padding)

    @property
    def encoder_layers(self) -> tuple[int, ...]:
        """The last layer that runs, where its attention is asked for."""
        return (-1,) if "received_attention" in self.needs else ()

    @property
    def feature_layer(self) -> int | None:
        """The encoder layer that the network reads."""
        return self._files.config.layer if self.encoder_layer is None else self.encoder_layer

    @property
    def varies(self) -> bool:
        """Whether the number of kept tokens may differ from the kept ratio's."""
        return self.target is not None or self.pad == "none"

    def check_model(self, image_tokens: int | None, encoder_width: int | None) -> None:
        trained = self._files.config.width
        if encoder_width not in (None, trained):
            raise ValueError(
                f"OC-VTP's pruner {self.checkpoint} reads features of width {trained}, but this vision tower's have "
                f"{encoder_width}: name one that was trained on it (OCVTP_CHECKPOINT)"
            )

    def check_budget(self, ratio: float | None, layer: int | None) -> None:
        if self.target is None:
            super().check_budget(ratio, layer)
        elif ratio is not None:
            raise ValueError(
                f"OC-VTP's target={self.target} sets how many tokens are kept: leave out the kept ratio "
                f"(SUBSET_RATIO), which is {ratio}"
            )
        if self.varies and layer:
            raise ValueError(
                "OC-VTP with a target, or with pad=none, works before the decoder, where its tokens can be counted: "
                f"the layer (LAYER_INDEX) must be 0 or left out, not {layer}"
            )

    def schedule_for(self, ratio: float | None, layer: int | None, num_layers: int) -> tuple[tuple[int, float], ...]:
        """As for every method; the fraction of a target is the bound that is known beforehand, 1."""
        return super().schedule_for(ratio if self.target is None else 1.0, layer, num_layers)

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        n = tokens.features.shape[1]
        k = tokens.k if self.target is None else min(self.target, n)
        if k >= n:
            return torch.arange(n, device=tokens.features.device).expand(len(tokens.features), n)
        chosen = []
        # One look at the whole batch: on a GPU the host waits at each.
        for image, patches in enumerate(tokens.layer_features.any(dim=-1).sum(dim=-1).tolist()):
            claimed = claims(self.slot_attention(tokens, image, k, patches), self.top_k)
            chosen.append(fill(claimed, self._padding(tokens, image), k))
        return torch.stack(chosen)

    def slot_attention(self, tokens: VisualTokens, image: int, k: int, patches: int | None = None) -> torch.Tensor:
        """How the slots share one image's tokens when ``k`` are kept: (S, N), float32, ``-inf`` for a newline.

        ``patches`` is how many of the tokens are no newlines, where that is known. One image at a time: in a batch,
        rounding could tip a choice that hangs on the last digit.
        """
        features = tokens.layer_features[image : image + 1].float()
        is_patch = features.any(dim=-1)  # (1, N)
        network = self._files.network(features.device)
        slots = max(1, min((k + self.has_cls) // self.top_k, int(is_patch.sum()) if patches is None else patches))
        noise = slot_noise(self.seed, slots, network.config.slot_width)
        with torch.autocast(features.device.type, enabled=False):
            attention = network(features, noise.to(features.device, non_blocking=True), is_patch)[1][0]
        return attention.masked_fill(~is_patch, -torch.inf)

    def _padding(self, tokens: VisualTokens, image: int) -> torch.Tensor | None:
        """What one image's unclaimed tokens are ranked by, (N,)."""
        if self.pad == "none":
            return None
        if self.pad == "random":
            values = self._drawn(tokens.image_keys[image], tokens.features.shape[1])
            values = values.to(tokens.features.device, non_blocking=True)
        elif self.attention == "cls":
            values = tokens.cls_attention[image].mean(dim=-1)
        else:
            values = tokens.received_attention[image, :, 0]
        return values.float().masked_fill(~tokens.layer_features[image].any(dim=-1), -torch.inf)

    def _drawn(self, image_key: int, n: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{image_key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(n, generator=generator)
