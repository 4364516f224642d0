"""What prunes one model: the configuration, its method, and where that drops how much."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from llava.model.image_tokens import tokens_of_an_image
from llava.model.multimodal_encoder.observations import EncoderObserver, encoder_outputs
from llava.pruning.base import Pruner
from llava.pruning.config import PruningConfig
from llava.pruning.schedule import Schedule, kept_after_attention, kept_per_layer
from llava.pruning.scheduled import drops_before_decoder, drops_inside_decoder


@dataclass(frozen=True)
class ActivePruner:
    """A method on a model; without one, nothing is pruned.

    Attributes
    ----------
    pruner : Pruner or None
        None that merges tokens may drop after the attention, whose output it does not see: a `ValueError`.
    schedule : tuple of (layer, fraction)
        See `Pruner.schedule_for`; empty where the method has yet to be fitted to the model.
    config : PruningConfig or None
        None for a method that was put there by hand.
    """

    pruner: Pruner | None = None
    schedule: Schedule = ()
    config: PruningConfig | None = None

    def __post_init__(self):
        if self.pruner is not None and self.pruner.after_attention and self.pruner.merges:
            raise ValueError(f"{type(self.pruner).__name__} merges tokens: it cannot drop after a layer's attention")

    @property
    def _method(self) -> Pruner:
        """What prunes, where something is to be pruned."""
        assert self.pruner is not None
        return self.pruner

    @property
    def before_decoder(self) -> bool:
        """Whether tokens are dropped before the splice."""
        return self.pruner is not None and drops_before_decoder(self.pruner, self.schedule)

    @property
    def inside(self) -> ActivePruner:
        """What the decoder drops."""
        return self if self.pruner is None else ActivePruner(*drops_inside_decoder(self.pruner, self.schedule))

    @property
    def inside_decoder(self) -> bool:
        """Whether the decoder drops any."""
        return bool(self.inside.schedule)

    @property
    def leaves_gaps(self) -> bool:
        """Whether positions before the decoder are the original ones, with gaps where tokens were dropped."""
        return self.before_decoder and self._method.position_ids == "original"

    @property
    def compact(self) -> bool:
        """Whether what is kept inside the decoder gets new rotary positions without gaps."""
        return self._method.position_ids == "compact"

    def needs(self, signal: str) -> bool:
        """Whether the method looks at a signal."""
        return self.pruner is not None and signal in self.pruner.needs

    def drops_after_attention(self, layer: int, totals: Sequence[int]) -> bool:
        """Whether tokens leave after this layer's attention, of images that had ``totals`` of them."""
        fractions = dict(self.schedule)
        if not self._method.after_attention or layer + 1 not in fractions:
            return False
        present = min((fraction for begin, fraction in self.schedule if begin <= layer), default=1.0)
        left, budget = fractions[layer + 1], self._method.kept_count
        return self._method.varies or any(budget(n, left) < budget(n, present) for n in totals)

    def tokens_per_layer(self, total: int, kept: int, layers: int) -> tuple[int, ...]:
        """What each decoder layer sees of an image with ``total`` tokens, ``kept`` of which enter the decoder."""
        if not self.inside_decoder:
            return (kept,) * layers
        return tuple(kept_per_layer(self.schedule, total, layers, self._method.kept_count))

    def tokens_after_attention(self, total: int, kept: int, layers: int) -> tuple[int, ...]:
        """The same in each layer's output projection and feed-forward block."""
        if self.pruner is None or not self.pruner.after_attention:
            return self.tokens_per_layer(total, kept, layers)
        return tuple(kept_after_attention(self.schedule, total, layers, self._method.kept_count))


def accepted(model: Any, config: PruningConfig) -> ActivePruner:
    """A configuration as it prunes a model of this package.

    Raises a `ValueError`, which begins with what was set and it would not be raised without, if the layer is not one of
    the model's, its decoder cannot meet the budget, the options belong to another model, or the vision tower cannot
    serve them.
    """
    config, tower = config.for_width(model.config.hidden_size), model.get_vision_tower()
    config = config.for_encoder(has_cls=True)  # every tower of this package is CLIP's

    def attempt(config: PruningConfig) -> ActivePruner:
        pruner = config.build_pruner()
        schedule = config.schedule(model.config.num_hidden_layers)
        pruner.check_model(tokens_of_an_image(model), None if tower is None else tower.hidden_size)
        if tower is not None:
            EncoderObserver(chain.from_iterable(encoder_outputs(pruner).values()), tower.depth)  # refuses other layers
        return ActivePruner(pruner, schedule)

    return dataclasses.replace(config.blame(attempt), config=config)


def fitted(model: Any, active: ActivePruner) -> ActivePruner:
    """The same with a schedule that the method, which has none yet, has learnt from the model; see `Pruner.fit`."""
    assert active.config is not None
    pruner: Any = active.pruner  # with `fit`: it has no schedule yet
    model.active_pruner = ActivePruner()
    try:
        return dataclasses.replace(active, schedule=pruner.fit(model, active.config.ratio))
    finally:
        model.active_pruner = active
