"""The letters that signs and pages are printed in."""

from __future__ import annotations

import numpy as np

GLYPH_WIDTH, GLYPH_HEIGHT = 5, 7

# 5 x 7 dots a character, one number per row, the leftmost dot in bit 4.
FONT = {
    "a": (14, 17, 17, 31, 17, 17, 17),
    "b": (30, 17, 17, 30, 17, 17, 30),
    "c": (14, 17, 16, 16, 16, 17, 14),
    "d": (30, 17, 17, 17, 17, 17, 30),
    "e": (31, 16, 16, 30, 16, 16, 31),
    "f": (31, 16, 16, 30, 16, 16, 16),
    "g": (14, 17, 16, 23, 17, 17, 14),
    "h": (17, 17, 17, 31, 17, 17, 17),
    "i": (14, 4, 4, 4, 4, 4, 14),
    "j": (7, 2, 2, 2, 2, 18, 12),
    "k": (17, 18, 20, 24, 20, 18, 17),
    "l": (16, 16, 16, 16, 16, 16, 31),
    "m": (17, 27, 21, 21, 17, 17, 17),
    "n": (17, 25, 25, 21, 19, 19, 17),
    "o": (14, 17, 17, 17, 17, 17, 14),
    "p": (30, 17, 17, 30, 16, 16, 16),
    "q": (14, 17, 17, 17, 21, 18, 13),
    "r": (30, 17, 17, 30, 20, 18, 17),
    "s": (15, 16, 16, 14, 1, 1, 30),
    "t": (31, 4, 4, 4, 4, 4, 4),
    "u": (17, 17, 17, 17, 17, 17, 14),
    "v": (17, 17, 17, 17, 17, 10, 4),
    "w": (17, 17, 17, 21, 21, 27, 17),
    "x": (17, 17, 10, 4, 10, 17, 17),
    "y": (17, 17, 10, 4, 4, 4, 4),
    "z": (31, 1, 2, 4, 8, 16, 31),
    "0": (14, 17, 19, 21, 25, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 6, 8, 16, 31),
    "3": (30, 1, 1, 14, 1, 1, 30),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
}
# On pages only.
MARKS = {".": (0, 0, 0, 0, 0, 12, 12), " ": (0, 0, 0, 0, 0, 0, 0)}


def dots(character: str, scale: int) -> np.ndarray:
    """A character's ink: 0 or 1, int64 ``(7 * scale, 5 * scale)``."""
    rows = np.array((FONT | MARKS)[character])
    bits = (rows[:, None] >> np.arange(GLYPH_WIDTH - 1, -1, -1)) & 1  # (7, 5)
    return bits.repeat(scale, 0).repeat(scale, 1)


def text_width(text: str, scale: int) -> int:
    """Pixels from the first letter's left to the last one's right side; a dot lies between two letters."""
    return ((GLYPH_WIDTH + 1) * len(text) - 1) * scale
