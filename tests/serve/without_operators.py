"""Lets a torchvision be imported whose compiled operators cannot be loaded: ``without_operators.py SITE``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

DESCRIPTION = re.compile(r"^@(\S+\.register_fake\(.*\))$", re.MULTILINE)


def main(site: str) -> None:
    """Make torchvision describe its operators only where they exist."""
    file = Path(site) / "torchvision" / "_meta_registrations.py"
    where_loaded = r"@(\1 if torchvision.extension._has_ops() else lambda function: function)"
    file.write_text(DESCRIPTION.sub(where_loaded, file.read_text()))


if __name__ == "__main__":
    main(sys.argv[1])
