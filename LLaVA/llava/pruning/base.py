"""The contract of a selection method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from llava.pruning.reduce import chosen, reduce
from llava.pruning.schedule import Schedule, kept_count
from llava.pruning.tokens import KeptTokens, VisualTokens

BEFORE, INSIDE = "before the decoder", "inside the decoder"


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """A selection method; the fields of a subclass are its options.

    A subclass is a frozen dataclass with one method: `select`, or `merge` where tokens are merged and not only chosen.
    The class attributes say what the method is and needs; the model computes what is in ``needs``, and only then.

    Attributes
    ----------
    position_ids : str
        Rotary positions of what is kept and of the text after it: "original" leaves them as they were, "compact"
        renumbers them without gaps. "auto" is compact before the decoder, as published, and original inside it.
    per_crop : bool
        Give every crop of an anyres image its share of the budget and select in each crop alone.
    budget : str
        "fixed": the kept ratio holds for every image. "effective_rank": it holds in the mean over images, and an image
        gets its share by `llava.pruning.own_budget.effective_rank` over ``reference_rank``.
    reference_rank : float or None
        Mean effective rank of the images that the ratio is to hold for.
    drop_duplicates : bool
        Of tokens whose patches have the same pixels, only the first is there to be chosen; see `own_budget.distinct`.
    where : str
        Where the method works: `BEFORE` the decoder, or `INSIDE` it.
    needs : frozenset of str
        `Signals` that the method reads beside the features and the layout.
    source, venue : str
        Paper or definition, and where it was published.
    year : int or None
        Of the publication.
    cost : str
        What choosing costs beside the model, per image of N tokens of width D, or C in the vision encoder, k of them
        kept.
    licence : str
        A note on the licence of the published code. Nothing of it is used here.
    first_layer, default_layer : int
        The lowest decoder layer whose input the method can prune, and the one it prunes when none is named.
    encoder_layers : tuple of int
        Vision-encoder layers of the signals (B, N, E), 0-based or from the end; -1 is the last one that runs.
    feature_layer : int or None
        Vision-encoder layer of ``layer_features``, counted in the same way.
    varies : bool
        Whether the number of kept tokens depends on the image rather than on the budget alone.
    later : Pruner or None
        The method that drops at the layers of the schedule after its first, where that is another one. It may look at
        the decoder's signals alone, and keeps as many tokens as this one's `kept_count`.
    after_attention : bool
        Whether what is dropped at a layer's input leaves in the layer before already, between its attention and the
        output projection. There, and only there, ``visual_attention`` and ``text_attention`` are known.
    """

    source: ClassVar[str] = ""
    venue: ClassVar[str] = ""
    year: ClassVar[int | None] = None
    cost: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    after_attention: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for former, name in (("stage", "where"), ("budget", "kept_count")):
            if former in vars(cls):
                raise TypeError(f"{cls.__name__}.{former} is called `{name}` since 0.2")

    position_ids: Literal["auto", "original", "compact"] = "auto"
    per_crop: bool = False
    budget: Literal["fixed", "effective_rank"] = "fixed"
    reference_rank: float | None = None
    drop_duplicates: bool = False

    # Attributes of the class in most methods; in some, they depend on the options.

    @property
    def where(self) -> str:
        return BEFORE

    @property
    def first_layer(self) -> int:
        return 0

    @property
    def default_layer(self) -> int | None:
        return 0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @property
    def encoder_layers(self) -> tuple[int, ...]:
        return ()

    @property
    def feature_layer(self) -> int | None:
        return None

    @property
    def later(self) -> Pruner | None:
        return None

    @property
    def varies(self) -> bool:
        return False

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
        return chosen(self, tokens)

    @property
    def merges(self) -> bool:
        """Whether features change on the way, and are not only chosen."""
        return type(self).merge is not Pruner.merge

    @property
    def keeps_raster_order(self) -> bool:
        """Whether chosen tokens go on in raster order (else in the order that `select` returned)."""
        return True

    def check_budget(self, ratio: float | None, layer: int | None) -> None:
        """Refuse a kept ratio and a layer (None: not given) that do not go with the options, with a `ValueError`."""
        if ratio is None:
            raise ValueError("a kept ratio is needed (SUBSET_RATIO): the fraction of visual tokens kept, 0 < r <= 1")

    def schedule_for(self, ratio: float | None, layer: int | None, num_layers: int) -> Schedule:
        """Where a decoder of ``num_layers`` drops, and what fraction of an image's tokens is there from then on.

        Returns
        -------
        tuple of (layer, fraction)
            Ascending layers, 0-based: the drop is at that layer's input, at 0 before the decoder. With
            ``after_attention`` the layer ``num_layers`` stands for a drop in the last one. Empty for a method that has
            to learn it from the model first: it then has ``fit(model, ratio)``, which returns it.

        Raises
        ------
        ValueError
            If this decoder cannot meet the budget.
        """
        layer = self.default_layer if layer is None else layer
        assert layer is not None and ratio is not None  # check_budget's
        return ((layer, ratio),)

    @property
    def count_is_known(self) -> bool:
        """Whether the number of an image's tokens says how many are kept."""
        return not self.varies and self.budget == "fixed" and not self.drop_duplicates

    def kept_count(self, n: int, fraction: float) -> int:
        """How many of an image's ``n`` tokens are left where ``fraction`` of them is to be there."""
        return kept_count(n, fraction)

    def check_model(self, image_tokens: int | None, encoder_width: int | None) -> None:
        """Refuse a model, with a `ValueError`.

        Parameters
        ----------
        image_tokens : int or None
            Visual tokens of every image; None where that depends on the image.
        encoder_width : int or None
            Width of the vision encoder's features; None where there is none.
        """

    def for_width(self, width: int) -> Pruner:
        """This method with the defaults that depend on the tokens' width filled in."""
        return self

    def for_encoder(self, has_cls: bool) -> Pruner:
        """This method with the defaults that depend on whether the vision encoder has a [CLS] token filled in."""
        return self

    def advice(self, model: Any) -> list[str]:
        """What a person should know of this method in a loaded model, a line each; printed once, when it is loaded."""
        return []

    def digests(self) -> dict[str, str]:
        """Option name -> digest of the file that it names: a file's content counts like any other option."""
        return {}

    @torch.no_grad()
    def indices(self, tokens: VisualTokens) -> torch.Tensor:
        """`reduce`'s indices alone: (B, k), int64."""
        return self.reduce(tokens).indices

    def reduce(self, tokens: VisualTokens) -> KeptTokens:
        """`llava.pruning.reduce.reduce` with this method."""
        return reduce(self, tokens)
