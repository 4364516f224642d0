"""Reads and checks the settings that lmms-eval passes as text or dictionaries."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

_DTYPES = ("float32", "float16", "bfloat16")


def read_batch_size(value: int | str) -> int:
    """A whole number >= 1; lmms-eval passes the command line's text.

    Raises
    ------
    ValueError
    """
    if str(value).isascii() and str(value).isdigit() and int(value) >= 1:
        return int(value)
    raise ValueError(f"batch_size={value}: must be a whole number >= 1")


def read_visual_cache(value: int | str) -> int | None:
    """Bytes that encoded images may take; None for "off".

    Raises
    ------
    ValueError
    """
    if str(value) == "off":
        return None
    if str(value).isascii() and str(value).isdigit():
        return int(value)
    raise ValueError(f"visual_cache={value}: must be a whole number of bytes, or off")


def read_dtype(name: str, device: torch.device) -> torch.dtype:
    """The floating type of weights and images; "auto" is float32 on a CPU and float16, as published, on a GPU.

    Raises
    ------
    ValueError
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ValueError(f"dtype={name}: allowed are auto, {', '.join(_DTYPES)}")
    return getattr(torch, name)


_ALLOWED = {
    "max_new_tokens": ("a whole number >= 1", lambda value: float(value).is_integer() and value >= 1),
    "num_beams": ("a whole number >= 1", lambda value: float(value).is_integer() and value >= 1),
    "temperature": ("a number >= 0", lambda value: 0 <= value < math.inf),
    "top_p": ("a number with 0 <= p <= 1", lambda value: 0 <= value <= 1),
}


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate; defaults are those of lmms-eval's builtin wrapper.

    Attributes
    ----------
    max_new_tokens : int
    temperature : float
        0 is greedy.
    top_p : float, or None
        Applies only with a temperature.
    num_beams : int
    image_aspect_ratio : str, or None
        For checkpoints whose configuration has none.
    ignored : frozenset of str
        Settings of the task that have no effect here.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    image_aspect_ratio: str | None = None
    ignored: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The settings that have an effect."""
        return tuple(name for name in cls.__dataclass_fields__ if name != "ignored")

    @classmethod
    def read(cls, gen_kwargs: Mapping[str, Any]) -> GenerationSettings:
        """From a task's ``generation_kwargs``, which stay as they are.

        ``until`` is not applied, as in the builtin wrapper: LLaVA stops at its end-of-sequence token. ``do_sample``
        follows from the temperature.

        Raises
        ------
        ValueError
            For a value that nothing can be generated with.
        """
        known = cls.names()
        values = {name: value for name, value in gen_kwargs.items() if name in known and value is not None}
        if values.get("temperature", 0.0) == 0:
            values["temperature"] = 0.0
            values.pop("top_p", None)
        for name, (allowed, fits) in _ALLOWED.items():
            if name in values and not (isinstance(values[name], (int, float)) and fits(values[name])):
                raise ValueError(f"the generation setting {name}={values[name]} must be {allowed}")
        return cls(**values, ignored=frozenset(gen_kwargs) - set(known) - {"until", "do_sample"})

    def to_dict(self) -> dict[str, Any]:
        """All that determines an answer, JSON-serialisable; ``GenerationSettings(**it)`` equals this one."""
        values = asdict(self)
        del values["ignored"]
        return values

    def arguments(self) -> dict[str, Any]:
        """For ``generate``."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        how = sampling if self.temperature > 0 else {"do_sample": False}
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, **how}

    def preprocessing(self, config: Any) -> Any:
        """A copy of a model's configuration, with ``image_aspect_ratio`` if it has none of its own."""
        config = copy.copy(config)
        if self.image_aspect_ratio is not None and "image_aspect_ratio" not in config.__dict__:
            config.image_aspect_ratio = self.image_aspect_ratio
        return config
