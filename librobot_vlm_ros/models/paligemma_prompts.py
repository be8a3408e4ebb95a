"""What PaliGemma is asked and what it answers: prefixes, and boxes of location tokens.

Prefixes as published with the model (Beyer et al., 2024, arXiv:2407.07726). A box is four tokens
``<loc0000>`` to ``<loc1023>`` in the order y_min, x_min, y_max, x_max, in 1024ths of the image's
height and width, then the label; several are parted by ``;``. The codes ``<seg000>`` to
``<seg127>`` behind a box describe a mask for a decoder that is not part of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.models import questions

__all__ = ["BINS", "PALIGEMMA_TASKS", "parse_locations", "question"]

BINS = 1024
#: A task's prefix; `{text}` stands for the user's words.
PALIGEMMA_TASKS: Mapping[str, str] = {
    "answer": "answer en {text}",
    "caption": "caption en",
    "detailed_caption": "describe en",
    "ground": "detect {text}",
    "ocr": "ocr",
    "open_vocabulary_detect": "detect {text}",
}

_BOX = re.compile(r"\s*<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>(?:<seg\d{3}>)*\s*([^<>]*)")
_LISTED = re.compile(r"\s*[;,]\s*")

Score = Callable[[Sequence[tuple[int, int]]], float]


def question(task: str, text: str) -> str:
    """A task's prefix. Raises RequestError EMPTY_PROMPT or BAD_PARAMETER."""
    if PALIGEMMA_TASKS[task].startswith("detect"):
        text = " ; ".join(part for part in _LISTED.split(text) if part)
    return questions.question(PALIGEMMA_TASKS, task, text)


def parse_locations(
    text: str,
    width: int,
    height: int,
    label: str = "",
    score: Score = lambda stretches: math.nan,
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many pieces are no box.

    `label` names boxes that come without a label. A box inside out or beyond the last bin counts as
    none, and so does an answer without any.
    """
    regions: list[Region] = []
    pieces = begin = 0
    for piece in [*text.split(";")]:
        end = begin + len(piece)
        found = _BOX.fullmatch(piece)
        if piece.strip():
            pieces += 1
        if found:
            y_min, x_min, y_max, x_max = (int(number) for number in found.groups()[:4])
            if max(y_max, x_max) < BINS and y_min <= y_max and x_min <= x_max:
                x_scale, y_scale = width / BINS, height / BINS
                box = (x_min * x_scale, y_min * y_scale, x_max * x_scale, y_max * y_scale)
                name = found.group(5).strip() or label
                regions.append(Region(name, score([(begin, end)]), *box))
        begin = end + 1
    return tuple(regions), max(1, pieces) - len(regions)
