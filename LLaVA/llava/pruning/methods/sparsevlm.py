"""SparseVLM: the question's relevant words judge the visual tokens; some of the rejected ones are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from llava.pruning.schedule import Schedule
from llava.pruning.scheduled import ScheduledPruner
from llava.pruning.similarity import wide
from llava.pruning.tokens import KeptTokens, VisualTokens, gather_tokens

PUBLISHED_TOKENS = 576
LAYERS = (3, 7, 16)
"""Layers at whose input the tokens leave: the outputs of the published 2, 6 and 15, of 32."""

RANKED = {
    True: {"192": (300, 200, 110), "128": (303, 110, 36), "96": (238, 48, 26), "64": (66, 30, 17)},
    False: {"192": (300, 200, 118), "128": (238, 108, 60), "96": (246, 54, 28), "64": (66, 34, 20)},
}
"""Of 576 tokens, how many the published code keeps by rank: with recycling (its version 1) and without (version 2)."""


def select_raters(visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Text tokens (T, D) that the image (n, D) speaks to more than to the average one: (T,), bool.

    p = mean over visual tokens of softmax over text tokens of (visual text^T); raters have p > mean(p). All of them
    where none stands out (a single text token, or equal ones).
    """
    with torch.autocast(visual.device.type, enabled=False):
        p = (visual.float() @ text.float().T).softmax(dim=-1).mean(dim=0)
    above = p > p.mean()
    return above | ~above.any()


def recycled_counts(dropped: int) -> tuple[int, int]:
    """Of ``dropped`` tokens, how many are recycled, and into how many: int(0.3 n) + 1 and a tenth of them, plus 1."""
    candidates = 3 * dropped // 10 + 1
    return candidates, candidates // 10 + 1


def split_budget(n: int, k: int) -> tuple[int, int, int]:
    """How many of ``n`` tokens are kept, recycled, and what the recycled ones are merged into, within a budget k < n.

    The largest number kept, and thus the fewest merged, for which kept + merged = k, where kept tokens leave
    `recycled_counts` of the others to be merged, into at most a fifth of the budget. The published stages, where the
    merged ones come on top, are met (300 + 9 of 576 for k = 309) and stay within that fifth (at most 16 of 82); without
    it, a small budget would all be spent on merged tokens. 0 are recycled where nothing is merged.
    """
    for kept in range(k, -1, -1):
        candidates, merged = recycled_counts(n - kept)
        merged = min(merged, k // 5)
        if kept + merged == k:
            break
    return kept, candidates if merged else 0, merged


def density_peaks(
    x: torch.Tensor, clusters: int, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster tokens (B, M, D) around density peaks (DPC-KNN): centres (B, clusters) by falling score, and assignment.

    With d the Euclidean distance over sqrt(D): the density of a token is exp(-mean of d^2 to its ``clusters`` nearest,
    itself included); its parent distance is that to the closest denser token (the largest distance there is for the
    densest); centres are the tokens with the largest product of both, and the others go to the nearest centre, whose
    position among the centres is their assignment (B, M).

    1e-6 of ``noise`` (B, M) is added to the densities, which is how the published code breaks ties. Without it, the
    lower index counts as the denser.
    """
    # Products of norms would lose the zero between duplicates.
    distance = torch.cdist(x.float(), x.float(), compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    nearest = distance.topk(clusters, dim=-1, largest=False).values
    density = nearest.square().mean(dim=-1).neg().exp()
    if noise is not None:
        density = density + 1e-6 * noise
    place = torch.arange(x.shape[1], device=x.device)
    own, other = density.unsqueeze(2), density.unsqueeze(1)
    denser = (other > own) | ((other == own) & (place < place.unsqueeze(1)))  # (B, M, M): is the second the denser?
    farthest = distance.amax(dim=(1, 2), keepdim=True)
    parent = torch.where(denser, distance, farthest).amin(dim=-1)
    centres = (density * parent).argsort(dim=-1, descending=True, stable=True)[:, :clusters]
    to_centres = distance.gather(1, centres.unsqueeze(-1).expand(-1, -1, x.shape[1]))  # (B, clusters, M)
    assignment = to_centres.argmin(dim=1)
    # Of two centres in the same place, each keeps a cluster of its own.
    numbers = torch.arange(clusters, device=x.device).expand(len(x), -1)
    return centres, assignment.scatter(1, centres, numbers)


def merge_clusters(x: torch.Tensor, assignment: torch.Tensor, clusters: int) -> torch.Tensor:
    """Mean of every cluster: (B, M, D) and (B, M) -> (B, clusters, D), `wide`."""
    x = wide(x)
    member = torch.nn.functional.one_hot(assignment, clusters).to(x.dtype)  # (B, M, clusters)
    return member.mT @ x / member.sum(dim=1).unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class SparseVLM(ScheduledPruner):
    """At the input of three layers, the visual tokens that the raters attended to most in the layer before.

    Raters are the text tokens after the image that `select_raters` finds once, on the decoder's input. Of the tokens
    that are dropped, the most relevant 30 % are recycled: clustered and averaged into a few that follow the kept ones.
    A merged token stands where its cluster's centre stood.

    The published code renumbers the rotary positions (``position_ids="compact"``). Its version 2 also ranks by another
    attention (divided by its rotary part, of selected heads), which is not done here.

    Attributes
    ----------
    schedule : str
        "192", "128", "96" and "64" are the published ones, a budget each: the tokens of 576 that layers 3, 7 and 16 of
        32 see, merged ones included. "scaled": the one called 192, the mildest and most even of them, scaled to
        SUBSET_RATIO by `llava.pruning.schedule.scaled`.
    recycle : bool
        Merge a share of the dropped tokens, within the budget. The published schedules without it are those of
        version 2.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rater_attention"})
    source: ClassVar[str] = "SparseVLM, arXiv 2410.04417"
    venue: ClassVar[str] = "ICML"
    year: ClassVar[int] = 2025
    cost: ClassVar[str] = "O(R T D) per drop for R rating tokens, clustering O(N^2 D)"
    licence: ClassVar[str] = "Apache-2.0"
    first_layer: ClassVar[int] = 1
    schedules: ClassVar[tuple[str, ...]] = tuple(RANKED[True])

    schedule: Literal["scaled", "192", "128", "96", "64"] = "scaled"
    recycle: bool = True

    def published(self, name: str) -> Schedule:
        return published_schedule(name, self.recycle)

    def raters(self, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The text tokens that judge; see `Signals`."""
        return select_raters(visual, text)

    @property
    def merges(self) -> bool:
        return self.recycle

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        return self._ranking(tokens)[:, : tokens.k]

    def merge(self, tokens: VisualTokens) -> KeptTokens:
        if not self.recycle:
            return super().merge(tokens)
        kept, candidates, merged = split_budget(tokens.features.shape[1], tokens.k)
        ranking = self._ranking(tokens)
        chosen = ranking[:, :kept].sort(dim=-1).values
        features = gather_tokens(tokens.features, chosen)
        if merged == 0:
            return KeptTokens(features, chosen)
        pool = ranking[:, kept : kept + candidates].sort(dim=-1).values
        recycled = gather_tokens(tokens.features, pool)
        centres, assignment = density_peaks(recycled.detach(), merged)
        means = merge_clusters(recycled, assignment, merged).to(features.dtype)
        return KeptTokens(torch.cat([features, means], dim=1), torch.cat([chosen, pool.gather(1, centres)], dim=1))

    def _ranking(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.rater_attention.argsort(dim=-1, descending=True, stable=True)


def published_schedule(name: str, recycle: bool) -> Schedule:
    """A published schedule as fractions of what was there at first, merged tokens included where there are any."""
    present, schedule = PUBLISHED_TOKENS, []
    for layer, kept in zip(LAYERS, RANKED[recycle][name], strict=True):
        present = kept + (recycled_counts(present - kept)[1] if recycle else 0)
        schedule.append((layer, present / PUBLISHED_TOKENS))
    return tuple(schedule)
