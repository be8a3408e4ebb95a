"""Boxes that models write in thousandths of an image's width and height."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.models.generation.constraints.box_syntax import MOST_BLANKS, SCALE

#: Patterns of the boxes that are written as text: blanks, and a number (a group) between blanks.
BLANKS = rf"\s{{0,{MOST_BLANKS}}}"
NUMBER = rf"{BLANKS}(\d{{1,5}}(?:\.\d{{1,6}})?){BLANKS}"

#: 1 % of the whole width or height, for each of a box's coordinates.
RADII = (SCALE / 100,) * 4


def region_of(
    numbers: Sequence[Any], label: str, score: float, width: int, height: int
) -> Region | None:
    """A box x_min, y_min, x_max, y_max in source pixels, None for what is no box of the image."""
    if len(numbers) != 4 or any(
        isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers
    ):
        return None
    x_min, y_min, x_max, y_max = numbers
    if not (0 <= x_min <= x_max <= SCALE and 0 <= y_min <= y_max <= SCALE):
        return None
    across, down = width / SCALE, height / SCALE
    return Region(label, score, x_min * across, y_min * down, x_max * across, y_max * down)
