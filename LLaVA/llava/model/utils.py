"""`llava.legacy.auto_upgrade` under the original's name."""

from llava.legacy import auto_upgrade

__all__ = ["auto_upgrade"]
