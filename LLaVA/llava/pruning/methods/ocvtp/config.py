"""What a pruner network is: its sizes, the encoder layer it reads, and what it was trained on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava.files import write_json

MODEL_TYPE = "ocvtp"


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of the decoder that a pruner is trained with.

    Attributes
    ----------
    tokens : int
        Tokens of a training image, each with a position of its own.
    width, heads, layers, feed_forward : int
    context : int
        Tokens that are shown where their number is not drawn.

    Raises
    ------
    ValueError
        If the heads do not divide the width.
    """

    tokens: int
    width: int
    heads: int = 4
    layers: int = 4
    feed_forward: int = 4096
    context: int = 24

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"the decoder's {self.heads} heads do not divide its width, {self.width}")


@dataclass(frozen=True)
class SlotConfig:
    """A pruner network; the defaults are the published sizes for CLIP-L.

    Attributes
    ----------
    width : int
        Of the vision encoder's features.
    hidden : int
        Of the projection in front of the slots.
    slot_width : int
    feed_forward : int
        Of the slots' feed-forward block.
    iterations : int
        Of slot attention.
    dropout : float
        In the slots' feed-forward block, in training.
    bi_level : bool
        Whether gradients reach the initial slots straight through all iterations but the last.
    layer : int or None
        Vision-encoder layer whose output is read, 0-based or from the end of the layers that run; None if not known.
    slots : int
        Number that the network was validated with; it runs with any.
    decoder : DecoderConfig or None
    trained_on : dict
        Where the features came from, and how long the network was trained.

    Raises
    ------
    ValueError
        For a size below 1.
    """

    width: int = 1024
    hidden: int = 2048
    slot_width: int = 512
    feed_forward: int = 2048
    iterations: int = 3
    dropout: float = 0.01
    bi_level: bool = True
    layer: int | None = 8
    slots: int = 64
    decoder: DecoderConfig | None = None
    trained_on: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("width", "hidden", "slot_width", "feed_forward", "iterations", "slots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of a pruner must be a whole number >= 1, not {value!r}")

    def save(self, folder: Path) -> None:
        """Write ``config.json``."""
        write_json(folder / "config.json", {"model_type": MODEL_TYPE, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> SlotConfig:
        """Read ``config.json``.

        Raises
        ------
        OSError
            If the folder has none.
        ValueError
            If it describes something else.
        """
        file = folder / "config.json"
        if not file.is_file():
            raise OSError(f"{folder} is no OC-VTP pruner: it has no config.json")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
            raise ValueError(f"{file} does not describe an OC-VTP pruner (model_type {MODEL_TYPE!r})")
        decoder = values.pop("decoder", None)
        try:
            return cls(**values, decoder=None if decoder is None else DecoderConfig(**decoder))
        except TypeError as error:
            raise ValueError(f"{file} does not describe an OC-VTP pruner: {error}") from error
