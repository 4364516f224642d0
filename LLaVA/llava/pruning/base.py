"""The contract of a pruner, and every invariant of a selection, once."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from llava.pruning.checks import require
from llava.pruning.layout import Layout, apportion


def kept_count(n: int, ratio: float) -> int:
    """Number of visual tokens that a kept ratio leaves of ``n``.

    ``max(1, int(round(ratio * n)))`` with Python's round (half to even), at most ``n``; 0 for a ratio of 0.
    """
    return min(n, max(1, round(ratio * n))) if ratio > 0 else 0


def content_key(tensor: torch.Tensor) -> int:
    """A 63-bit digest of a tensor's values (read as float32), the same in every process and on every machine."""
    values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return int.from_bytes(hashlib.sha256(values.numpy().tobytes()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class VisualTokens:
    """What a pruner sees: a batch of images with the same number of visual tokens, and the budget.

    In every tensor axis 0 is the image and axis 1 the token. All but the features and the budget is None unless the
    method asks for it in its ``needs`` (the layout comes whenever it is known).

    Attributes
    ----------
    features : Tensor (B, N, D), floating
        Projected visual tokens, raster order; inside the decoder, hidden states.
    k : int
        Budget: number of tokens to keep of each image.
    layout : tuple of FeatureMap, or None
        How the N tokens lie on the picture; None once some of them are gone.
    crops : Tensor (B, N), int64, or None
        Number of the crop that each token belongs to.
    image_keys : tuple of int, or None
        One content digest an image, for methods that draw at random.
    question : tuple of Tensor (T_i, D), or None
        The embedded text of each image's prompt behind its first image.
    encoder_features : Tensor (B, N, C), or None
        The vision encoder's features before the projector. In these and all that follow of the vision encoder,
        image-newline tokens have zeros.
    layer_features : Tensor (B, N, C), or None
        Output of the encoder layer that is the pruner's ``feature_layer``.
    encoder_keys : Tensor (B, N, c), or None
        Keys, averaged over the heads, of the encoder layer whose output is read.
    cls_attention : Tensor (B, N, H), float32, or None
        Attention of [CLS] in that layer, a head each.
    received_attention : Tensor (B, N, E), float32, or None
        Attention averaged over heads and over all queries, of each of the pruner's ``encoder_layers``.
    final_keys : Tensor (B, N, C), or None
        Keys of the encoder's last layer, all heads side by side.
    final_cls_attention : Tensor (B, N), float32, or None
        Attention of [CLS] in the encoder's last layer, taken as one wide head.
    text_similarity : Tensor (B, N), float32, or None
        Cosine between a patch and the question in CLIP's common space.
    last_attention : Tensor (B, N, H), float32, or None
        Attention, in the decoder layer before the drop, of the last prompt token, a head each.
    next_attention : Tensor (B, N, H), float32, or None
        The same in the decoder layer at whose input the drop happens.
    rater_attention : Tensor (B, N), float32, or None
        Attention, in the decoder layer before the drop, averaged over heads and over the text tokens that the pruner
        chose with `Pruner.raters`.
    visual_attention : Tensor (B, N), float32, or None
        For a drop behind a decoder layer's attention: what a token receives in that layer, in the head where it is
        most, averaged over the visual tokens of its image that are present.
    text_attention : Tensor (B, N), float32, or None
        The same, summed over the text of the prompt behind the image.
    whole : VisualTokens, or None
        With ``per_crop``, all tokens of the image that these are a crop of.
    """

    features: torch.Tensor
    k: int
    layout: Layout | None = None
    crops: torch.Tensor | None = None
    image_keys: tuple[int, ...] | None = None
    question: tuple[torch.Tensor, ...] | None = None
    encoder_features: torch.Tensor | None = None
    layer_features: torch.Tensor | None = None
    encoder_keys: torch.Tensor | None = None
    cls_attention: torch.Tensor | None = None
    received_attention: torch.Tensor | None = None
    final_keys: torch.Tensor | None = None
    final_cls_attention: torch.Tensor | None = None
    text_similarity: torch.Tensor | None = None
    last_attention: torch.Tensor | None = None
    next_attention: torch.Tensor | None = None
    rater_attention: torch.Tensor | None = None
    visual_attention: torch.Tensor | None = None
    text_attention: torch.Tensor | None = None
    whole: VisualTokens | None = None

    def at(self, image: int, places: torch.Tensor, k: int, layout: Layout | None = None) -> VisualTokens:
        """The tokens at ``places`` (n,) of one image alone, with a budget and a layout of their own."""
        parts = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                parts[field.name] = value[image : image + 1, places]
            elif field.name in ("image_keys", "question") and value is not None:
                parts[field.name] = value[image : image + 1]
        return dataclasses.replace(self, **parts, k=k, layout=layout)


BEFORE, INSIDE = "before the decoder", "inside the decoder"

ENCODER_NEEDS = frozenset(
    {
        "encoder_features",
        "layer_features",
        "encoder_keys",
        "cls_attention",
        "received_attention",
        "final_keys",
        "final_cls_attention",
    }
)
"""Fields of `VisualTokens` that the vision tower fills."""


@dataclass(frozen=True)
class KeptTokens:
    """What a pruner leaves.

    Attributes
    ----------
    features : Tensor (B, k, D)
        The tokens that go on, in this order, in the dtype of the input.
    indices : Tensor (B, k), int64
        Where they stood among the N; for a merged token, the place that stands for it. Distinct.
    """

    features: torch.Tensor
    indices: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """A selection method; the fields of a subclass are its options.

    A subclass is a frozen dataclass with one method: `select`, or `merge` where tokens are merged and not only chosen.
    The class attributes say what the method is and needs; the model computes what is in ``needs``, and only then.

    Attributes
    ----------
    position_ids : str
        Rotary positions of what is kept and of the text behind it: "original" leaves them as they were, "compact"
        renumbers them without gaps. "auto" is compact before the decoder, as published, and original inside it.
    per_crop : bool
        Give every crop of an anyres image its share of the budget and select in each crop alone.
    stage : str
        Where the method works: `BEFORE` the decoder, or `INSIDE` it.
    needs : frozenset of str
        Fields of `VisualTokens`, beyond the features and the budget, that the method reads. A property where it
        depends on the options.
    source : str
        Paper or definition.
    licence : str
        A note on the licence of the published code. Nothing of it is used here.
    first_layer, default_layer : int
        The lowest decoder layer whose input the method can prune, and the one it prunes when none is named.
    encoder_layers : tuple of int
        Vision-encoder layers of ``received_attention``, 0-based or from the end; -1 is the last one that runs.
    feature_layer : int or None
        Vision-encoder layer of ``layer_features``, counted in the same way.
    varies : bool
        Whether the number of kept tokens depends on the image rather than on the budget alone.
    after_attention : bool
        Whether what is dropped at a layer's input leaves in the layer before already, between its attention and the
        output projection. There, and only there, ``visual_attention`` and ``text_attention`` are known.
    """

    stage: ClassVar[str] = BEFORE
    needs: ClassVar[frozenset[str]] = frozenset()
    source: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    first_layer: ClassVar[int] = 0
    default_layer: ClassVar[int | None] = 0
    encoder_layers: ClassVar[tuple[int, ...]] = ()
    feature_layer: ClassVar[int | None] = None
    varies: ClassVar[bool] = False
    after_attention: ClassVar[bool] = False

    position_ids: Literal["auto", "original", "compact"] = "auto"
    per_crop: bool = False

    def select(self, tokens: VisualTokens) -> torch.Tensor:
        """Choose ``tokens.k`` of the N tokens of every image.

        Only called with 1 <= k < N and finite features, and without gradients. Each image's choice must not depend on
        the others, nor on anything but the options and the tokens; ties go to the lowest index. Autocast is off.

        Returns
        -------
        Tensor (B, k), int64, on the features' device
            Distinct indices in any order.
        """
        raise NotImplementedError(f"{type(self).__name__} merges tokens: it has no plain selection")

    def merge(self, tokens: VisualTokens) -> KeptTokens:
        """What is left of every image; by default what `select` chose, in raster order.

        Called as `select` is, but with gradients where the features have some: what goes on keeps them, as a training
        under pruning needs. A method that merges overrides this and returns (B, k, D) features with distinct indices,
        in the order in which they go on; one that ``varies`` may return any number of tokens for B = 1.
        """
        with torch.no_grad():
            chosen = self.select(tokens)
        if self.keeps_raster_order:
            chosen = chosen.sort(dim=-1).values
        return KeptTokens(gather_tokens(tokens.features, chosen), chosen)

    @property
    def merges(self) -> bool:
        """Whether features change on the way, and are not only chosen."""
        return type(self).merge is not Pruner.merge

    @property
    def keeps_raster_order(self) -> bool:
        """Whether chosen tokens go on in raster order (else in the order that `select` returned)."""
        return True

    def raters(self, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Which text tokens judge the visual ones, for methods that need ``rater_attention``.

        Parameters
        ----------
        visual : Tensor (n, D)
            An image's visual tokens at the decoder's input.
        text : Tensor (T, D)
            The embedded text behind it.

        Returns
        -------
        Tensor (T,), bool
        """
        return torch.ones(len(text), dtype=torch.bool, device=text.device)

    def check_budget(self, ratio: float | None, layer: int | None) -> None:
        """Refuse a kept ratio and a layer that do not go with the options.

        Parameters
        ----------
        ratio : float or None
            As given; None when it was left out.
        layer : int or None
            As given.

        Raises
        ------
        ValueError
            Names what is missing or too much.
        """
        if ratio is None:
            raise ValueError("a kept ratio is needed (SUBSET_RATIO): the fraction of visual tokens kept, 0 < r <= 1")

    def stages(self, ratio: float | None, layer: int | None, num_layers: int) -> tuple[tuple[int, float], ...]:
        """Where the method drops, and what fraction of an image's tokens is there from then on.

        Parameters
        ----------
        ratio, layer
            Of the configuration, checked.
        num_layers : int
            Decoder layers of the model.

        Returns
        -------
        tuple of (layer, fraction)
            Ascending layers, 0-based: the drop is at that layer's input, at 0 before the decoder. With
            ``after_attention`` the layer ``num_layers`` stands for a drop in the last one. Empty where `fits` says
            that only `fit` can tell.

        Raises
        ------
        ValueError
            If this decoder cannot meet the budget.
        """
        return ((self.default_layer if layer is None else layer, ratio),)

    def budget(self, n: int, fraction: float) -> int:
        """How many of an image's ``n`` tokens are left where ``fraction`` of them is to be there."""
        return kept_count(n, fraction)

    @property
    def fits(self) -> bool:
        """Whether the method, with these options, learns from the model where to drop before it can prune it."""
        return False

    def fit(self, model: Any, ratio: float | None) -> tuple[tuple[int, float], ...]:
        """`stages`, learnt from a loaded model, for a method that `fits`.

        Parameters
        ----------
        model
            A LLaVA model of this package with its weights, its vision tower and its ``prompt_tokenizer``; unpruned.
        ratio
            Of the configuration, checked.

        Raises
        ------
        ValueError
            If the model cannot be fitted, or not to this budget.
        """
        raise NotImplementedError(f"{type(self).__name__} has nothing to learn from a model")

    def check_tokens(self, n: int | None) -> None:
        """Refuse a model whose images have ``n`` visual tokens (None: it depends on the image) with a `ValueError`."""

    def for_width(self, width: int) -> Pruner:
        """This method with the defaults that depend on the tokens' width filled in."""
        return self

    def remarks(self, model: Any) -> list[str]:
        """What a person should know of this method in a loaded model, a line each; said once, when it is loaded."""
        return []

    def check_encoder(self, width: int) -> None:
        """Refuse a vision encoder whose features have ``width`` numbers with a `ValueError`."""

    def digests(self) -> dict[str, str]:
        """Option name -> digest of the file that it names: a file's content counts like any other option."""
        return {}

    @torch.no_grad()
    def indices(self, tokens: VisualTokens) -> torch.Tensor:
        """`reduce`'s indices alone: (B, k), int64."""
        return self.reduce(tokens).indices

    def reduce(self, tokens: VisualTokens) -> KeptTokens:
        """What is left of every image, validated; differentiable in the features, the choice being constant.

        Raises
        ------
        ValueError
            If the features are not a floating (B, N, D) tensor with finite values, the budget is below 1, or something
            that the method needs is missing.
        RuntimeError
            If the method broke its contract.
        """
        self._check(tokens)
        if tokens.k >= tokens.features.shape[1] and not self.varies:
            return _everything(tokens)
        if self.per_crop and tokens.crops is not None:
            kept = [self._reduce_per_crop(tokens, image) for image in range(len(tokens.features))]
            return KeptTokens(torch.cat([one.features for one in kept]), torch.cat([one.indices for one in kept]))
        return self._merge_checked(tokens)

    def _reduce_per_crop(self, tokens: VisualTokens, image: int) -> KeptTokens:
        crops = tokens.crops[image]
        numbers = crops.unique().tolist()
        places = [(crops == number).nonzero().flatten() for number in numbers]
        maps = None if tokens.layout is None else [crop for part in tokens.layout for crop in part.split()]
        whole = tokens.at(image, torch.arange(len(crops), device=crops.device), tokens.k, tokens.layout)
        features, indices = [], []
        for number, own, k in zip(numbers, places, apportion(tokens.k, [len(own) for own in places]), strict=True):
            if k == 0:
                continue
            part = tokens.at(image, own, k, None if maps is None else (maps[number],))
            part = dataclasses.replace(part, whole=whole)
            kept = _everything(part) if k >= len(own) and not self.varies else self._merge_checked(part)
            features.append(kept.features)
            indices.append(own[kept.indices])
        kept = KeptTokens(torch.cat(features, 1), torch.cat(indices, 1))
        if self.merges or not self.keeps_raster_order:
            return kept
        # A crop's tokens are not neighbours in the sequence.
        order = kept.indices.argsort(dim=-1)
        return KeptTokens(gather_tokens(kept.features, order), kept.indices.gather(1, order))

    def _merge_checked(self, tokens: VisualTokens) -> KeptTokens:
        batch, n, width = tokens.features.shape
        with torch.autocast(tokens.features.device.type, enabled=False):
            kept = self.merge(tokens)
        k = kept.indices.shape[-1] if self.varies else tokens.k
        name = type(self).__name__
        if kept.indices.shape != (batch, k) or kept.indices.dtype != torch.int64:
            raise RuntimeError(
                f"{name} returned {kept.indices.dtype} {tuple(kept.indices.shape)} indices, not int64 {(batch, k)}"
            )
        if kept.features.shape != (batch, k, width) or kept.features.dtype != tokens.features.dtype:
            raise RuntimeError(
                f"{name} returned {kept.features.dtype} {tuple(kept.features.shape)} tokens, "
                f"not {tokens.features.dtype} {(batch, k, width)}"
            )
        ascending = kept.indices.sort(dim=-1).values
        if not k:
            return kept
        require(
            ((ascending.diff(dim=-1) > 0).all(), RuntimeError(f"{name} chose a token twice")),
            (
                (ascending[:, 0].min() >= 0) & (ascending[:, -1].max() < n),
                RuntimeError(f"{name} chose a token that is not there"),
            ),
        )
        return kept

    def _check(self, tokens: VisualTokens) -> None:
        features = tokens.features
        if features.ndim != 3 or not features.is_floating_point() or 0 in features.shape[:2]:
            raise ValueError(
                f"Visual tokens must be a floating (B, N, D) tensor with B, N >= 1, not {features.dtype} "
                f"{tuple(features.shape)}"
            )
        if tokens.k < 1:
            raise ValueError(f"At least one visual token must be kept, not k = {tokens.k}")
        missing = sorted(name for name in self.needs if getattr(tokens, name) is None)
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs {', '.join(missing)} beside the visual tokens, which only a model gives: "
                "use BASELINE or pruning(model, ...)"
            )
        read = {"features": features} | {name: getattr(tokens, name) for name in sorted(self.needs)}
        read = {name: values for name, values in read.items() if isinstance(values, torch.Tensor)}
        said = {name: f"{name}, which {type(self).__name__} ranks by, contains" for name in read}
        said["features"] = "Visual tokens contain"
        require(
            *(
                (torch.isfinite(values).all(), ValueError(f"{said[name]} NaN or infinite values"))
                for name, values in read.items()
            )
        )


def gather_tokens(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The tokens (B, k, D) at ``indices`` (B, k) of ``features`` (B, N, D)."""
    return features.gather(1, indices.unsqueeze(-1).expand(-1, -1, features.shape[-1]))


def wide(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x y^T`` (..., n, m) of (..., n, D) and (..., m, D), `wide` whatever autocast surrounds it."""
    with torch.autocast(x.device.type, enabled=False):
        return wide(x) @ wide(y).mT


def _everything(tokens: VisualTokens) -> KeptTokens:
    batch, n, _ = tokens.features.shape
    return KeptTokens(tokens.features, torch.arange(n, device=tokens.features.device).expand(batch, n))
