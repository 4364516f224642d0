"""What a training leaves to read: a line of JSON an epoch, and the loss curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava.files import atomic_write

LOG = "log.jsonl"
CURVE = "loss.png"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The epochs that are on record."""
    file = folder / LOG
    return [json.loads(line) for line in file.read_text().split("\n") if line] if file.is_file() else []


def write_log(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Write all lines anew: after a run that was killed, the log may be ahead of the state."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    atomic_write(folder / LOG, text)


def draw_curve(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Draw training and validation loss by epoch into ``loss.png``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    epochs = [line["epoch"] for line in lines]
    axis.plot(epochs, [line["loss"] for line in lines], label="training")
    axis.plot(epochs, [line["validation"] for line in lines], label="validation", marker="o", markersize=3)
    best = min(lines, key=lambda line: line["validation"])
    axis.axvline(best["epoch"], color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="epoch", ylabel="area-weighted squared error")
    axis.set_title(f"best validation {best['validation']:.4g} after epoch {best['epoch']}", fontsize=10)
    axis.legend(frameon=False, loc="upper right")
    atomic_write(folder / CURVE, lambda part: figure.savefig(part, format="png", dpi=110))
