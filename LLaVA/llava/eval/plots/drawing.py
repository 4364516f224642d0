"""What all figures share: a plot with its numbers, saved as PNG and CSV, the same bytes each time."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.files import atomic_write, csv_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito: distinguishable with any colour vision.
_FIXED = {
    "otprune": ("#D55E00", "o"),
    "divprune": ("#0072B2", "s"),
    "random": ("#595959", "D"),
    "uniform": ("#009E73", "^"),
    "first_k": ("#CC79A7", "v"),
    "last_k": ("#B8860B", "P"),
    "dpp": ("#56B4E9", "*"),
    "fastv": ("#6A3D9A", "X"),
    "unpruned": ("#000000", "h"),
    "grey picture": ("#A0A0A0", "h"),
}
_FURTHER = ("8C564B", "17A2B8", "9A9A00", "1F4E79", "AA3377", "228833", "EE6677", "4B0082", "FF9F40", "2F4F4F")
_FURTHER_MARKERS = "<>pdH8"


@dataclass(frozen=True)
class Drawn:
    """A figure, its ``caption`` (what is shown, and how it was made), and its numbers, one record per CSV line."""

    name: str
    title: str
    caption: str
    records: Sequence[dict[str, Any]]
    figure: Figure

    def save(self, folder: Path) -> Path:
        """Write NAME.png and NAME.csv; returns the PNG's path."""
        path = folder / f"{self.name}.png"
        atomic_write(path, self.png())
        atomic_write(path.with_suffix(".csv"), self.csv())
        return path

    def png(self) -> bytes:
        """The PNG file, without metadata: matplotlib's version would change it."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        return buffer.getvalue()

    def csv(self) -> str:
        """The numbers."""
        return csv_text(list(self.records[0]), (map(_rounded, record.values()) for record in self.records))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, laid out without overlaps; independent of the user's matplotlib settings.

    Without matplotlib (the extra "figures") it is an `ImportError`.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'llava[figures]'") from error
    matplotlib.rcdefaults()
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return Figure(figsize=(width, height), layout="constrained")


def new_grid(number: int, wide: int, width: float, height: float, beside: float = 0) -> tuple[Figure, list[Axes]]:
    """A figure of ``number`` plots, at most ``wide`` in a row, each so many inches large, and room for a legend."""
    wide = min(wide, number)
    high = -(-number // wide)
    figure = new_figure(width * wide + beside, height * high + 0.7)
    axes = figure.subplots(high, wide, squeeze=False).ravel()
    for axis in axes[number:]:
        axis.set_axis_off()
    return figure, list(axes[:number])


def styles(series: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each series; the first of a well-known method has the same in every figure."""
    found: dict[str, dict[str, str]] = {}
    free, further = dict(_FIXED), 0
    for name in dict.fromkeys(series):
        method = re.split(r" \(|,|:", name)[0]
        look = free.pop(method, None)
        if look is None:
            look = f"#{_FURTHER[further % len(_FURTHER)]}", _FURTHER_MARKERS[further % len(_FURTHER_MARKERS)]
            further += 1
        found[name] = dict(zip(("color", "marker"), look, strict=True))
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; ties share the mean of their ranks. nan if one side is constant."""
    import pandas

    return float(pandas.Series(one).rank().corr(pandas.Series(other).rank()))


def _rounded(value: Any) -> Any:
    # The last digits of a sum are the machine's.
    return float(f"{value:.9g}") if isinstance(value, float) else value
