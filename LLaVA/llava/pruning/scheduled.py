"""Methods that drop at several places: before the decoder and inside it, or at layers of a published schedule."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from llava.pruning.base import INSIDE, Pruner
from llava.pruning.schedule import Schedule, at_relative_depth, scaled


def drops_before_decoder(pruner: Pruner, schedule: Schedule) -> bool:
    """Whether a method's first drop is before the decoder."""
    return bool(schedule) and schedule[0][0] == 0 and pruner.where != INSIDE


def drops_inside_decoder(pruner: Pruner, schedule: Schedule) -> tuple[Pruner, Schedule]:
    """Who drops inside the decoder, and where: the schedule without a drop before it."""
    if not drops_before_decoder(pruner, schedule):
        return pruner, schedule
    return pruner.later or pruner, schedule[1:]


@dataclass(frozen=True, kw_only=True)
class ScheduledPruner(Pruner):
    """A method with a published schedule: a subclass names its ``schedules`` and says what each is in `published`.

    Attributes
    ----------
    schedules : tuple of str
        Names of the published ones, each a budget of its own; the first is what "scaled" scales.
    schedule : str
        One of them; or "scaled", the first one scaled to SUBSET_RATIO by `llava.pruning.schedule.scaled`.
    """

    where: ClassVar[str] = INSIDE
    default_layer: ClassVar[int | None] = None
    schedules: ClassVar[tuple[str, ...]] = ()

    schedule: str = "scaled"

    def __post_init__(self):
        if self.schedule not in ("scaled", *self.schedules):
            raise ValueError(f"schedule must be scaled or {', '.join(self.schedules)}, not {self.schedule!r}")

    @abstractmethod
    def published(self, name: str) -> Schedule:
        """One of the published schedules, for a decoder of 32 layers."""

    def check_budget(self, ratio: float | None, layer: int | None) -> None:
        variable = f"{type(self).__name__.upper()}_SCHEDULE"
        if layer is not None:
            raise ValueError(
                f"LAYER_INDEX={layer} must be left out: the method drops at several layers, which {variable} and "
                "SUBSET_RATIO determine"
            )
        if self.schedule == "scaled" and ratio is None:
            raise ValueError(
                f"SUBSET_RATIO is needed with {variable}=scaled: the mean over the decoder's layers of the fraction of "
                "visual tokens present, 0 < r <= 1"
            )
        if self.schedule != "scaled" and ratio is not None:
            raise ValueError(
                f"SUBSET_RATIO={ratio:g} must be left out with {variable}={self.schedule}, which is a budget of its "
                f"own ({variable}=scaled takes one)"
            )

    def schedule_for(self, ratio: float | None, layer: int | None, num_layers: int) -> Schedule:
        if self.schedule == "scaled":
            assert ratio is not None  # check_budget's
            return scaled(self.published(self.schedules[0]), ratio, num_layers, self.first_layer)
        return at_relative_depth(self.published(self.schedule), num_layers, self.first_layer)
