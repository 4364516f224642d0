"""From a pruner's name to the network, read once a file and kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from llava.pruning.methods.ocvtp.network import SlotConfig, SlotPruner
from llava.pruning.methods.ocvtp.published import load_published
from llava.pruning.methods.trained import CONFIG, WEIGHTS

EMBEDDED = "llava-mini"
"""The pruner that ships with the package, for the model of this name."""


@dataclass(frozen=True)
class PrunerFiles:
    """A pruner on the disk: a folder of ours, or a file of the published code with, maybe, the ``sizes`` beside it."""

    path: Path
    sizes: Path | None = None

    @classmethod
    def find(cls, checkpoint: str, config: str | None = None) -> PrunerFiles:
        """The files that the method's options ``checkpoint`` and ``config`` name.

        An OSError if one is missing, a ValueError if a folder, which has a configuration of its own, is given another.
        """
        path = Path(checkpoint)
        if checkpoint == EMBEDDED and not path.is_dir():
            path = Path(__file__).parents[3] / "mini" / "ocvtp"
        if not path.exists():
            raise OSError(f"There is no pruner {checkpoint}")
        if config is not None and path.is_dir():
            raise ValueError(f"{checkpoint} has a config.json of its own: leave out {config}")
        found = cls(path, None if config is None else Path(config))
        for file in found._parts:
            if not file.is_file():
                raise OSError(f"There is no {file}")
        return found

    @property
    def _parts(self) -> list[Path]:
        if self.path.is_dir():
            return [self.path / CONFIG, self.path / WEIGHTS]
        return [self.path] if self.sizes is None else [self.path, self.sizes]

    @property
    def config(self) -> SlotConfig:
        """What the pruner is."""
        return self.network("cpu").config

    def network(self, device: torch.device | str) -> SlotPruner:
        """The network in float32 and eval mode, on a device."""
        # A pruner may be trained on while this process runs.
        stamp = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in self._parts)
        return _network(self, stamp, str(device))

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the files' content."""
        whole = hashlib.sha256()
        for file in self._parts:
            whole.update(hashlib.sha256(file.read_bytes()).digest())
        return whole.hexdigest()[:12]


@lru_cache(maxsize=4)
def _network(files: PrunerFiles, stamp: object, device: str) -> SlotPruner:
    if files.path.is_dir():
        network = SlotPruner.from_pretrained(files.path)
    else:
        network = load_published(files.path, files.sizes)
    return network.requires_grad_(False).to(device)
