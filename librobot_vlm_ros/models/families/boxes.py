"""Boxes that models write in thousandths of an image's width and height."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.models.generation.constraints.box_syntax import MOST_BLANKS, SCALE
from librobot_vlm_ros.models.generation.scores import Score, Span

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


def marked_boxes(
    text: str,
    width: int,
    height: int,
    label: str,
    score: Score,
    *,
    piece: re.Pattern[str],
    box: re.Pattern[str],
    places: Callable[[re.Match[str]], Sequence[Span]],
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many places are no box of it.

    `piece` finds a `label`, or what may hold boxes; `places` says where in that each one stands,
    and `box` reads its four numbers. Boxes belong to the label before them, and to `label` where
    there is none. A piece without any place counts as one that is no box, and so does an answer
    without any box.
    """
    regions: list[Region] = []
    pieces, labelled = 0, None
    for found in piece.finditer(text):
        if found["label"] is not None:
            if found["label"].strip():
                label, labelled = found["label"].strip(), found.span("label")
            continue
        spans = places(found)
        pieces += max(1, len(spans))
        for begin, end in spans:
            read = box.fullmatch(text, begin, end)
            if read is None:
                continue
            written = score(labelled, [read.span(number) for number in range(1, 5)], RADII, SCALE)
            region = region_of([float(n) for n in read.groups()], label, written, width, height)
            if region is not None:
                regions.append(region)
    return tuple(regions), max(1, pieces) - len(regions)
