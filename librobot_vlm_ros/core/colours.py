"""Colours of labels: an object that is named by its colour is drawn in it."""

from __future__ import annotations

import zlib

__all__ = ["Rgb", "colour_of", "hexadecimal", "ink_on"]

Rgb = tuple[int, int, int]

_NAMED: dict[str, Rgb] = {
    "red": (239, 68, 68),
    "yellow": (250, 204, 21),
    "green": (34, 197, 94),
    "cyan": (34, 211, 238),
    "blue": (96, 130, 255),
    "purple": (192, 90, 250),
    "orange": (251, 146, 60),
    "white": (240, 240, 240),
}
_OTHERS: tuple[Rgb, ...] = (
    (251, 146, 60),
    (244, 114, 182),
    (163, 230, 53),
    (45, 212, 191),
    (250, 240, 190),
    (196, 181, 253),
)


def colour_of(label: str) -> Rgb:
    """The colour that a label begins with, else one of a few that stays the same for it."""
    words = label.lower().split()
    if words and words[0] in _NAMED:
        return _NAMED[words[0]]
    return _OTHERS[zlib.crc32(label.lower().encode()) % len(_OTHERS)]


def ink_on(colour: Rgb) -> Rgb:
    """Black or white, whichever reads better on `colour`."""
    red, green, blue = colour
    return (17, 24, 39) if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else (255, 255, 255)


def hexadecimal(colour: Rgb) -> str:
    """`#rrggbb`"""
    return "#{:02x}{:02x}{:02x}".format(*colour)
