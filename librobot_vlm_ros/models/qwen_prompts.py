"""What Qwen-VL is asked and what it answers: sentences, and boxes from 0 to 1000.

Qwen2-VL (Wang et al., 2024, arXiv:2409.12191) writes the label between ``<|object_ref_start|>`` and
``<|object_ref_end|>``, then ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``; Qwen3-VL a JSON list of
``bbox_2d`` and ``label``.
Both count in thousandths of the image's width and height, whatever size it was resized to.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.models.boxes import BLANKS, MOST_BLANKS, NUMBER, Score, region_of
from librobot_vlm_ros.models.notation_json import JSON_PLACES

__all__ = ["QWEN2_TASKS", "QWEN3_TASKS", "parse_json_boxes", "parse_token_boxes"]

_COMMON = {
    "answer": "{text}",
    "caption": "Describe the image in one sentence.",
    "detailed_caption": "Describe the image in detail.",
    "ocr": "Read all the text in the image.",
}
#: A task's question; `{text}` stands for the user's words.
QWEN2_TASKS: Mapping[str, str] = {
    **_COMMON,
    "detect": "Detect all objects in the image and give their labels and bounding boxes.",
    "ground": "Detect the bounding box of {text}.",
    "open_vocabulary_detect": "Detect the bounding boxes of every {text}.",
}
QWEN3_TASKS: Mapping[str, str] = {
    **_COMMON,
    "detect": "Locate every object in the image. Report bbox coordinates and label in JSON format.",
    "ground": "Locate {text}. Report bbox coordinates and label in JSON format.",
    "open_vocabulary_detect": (
        'Locate every instance that belongs to the following categories: "{text}". '
        "Report bbox coordinates in JSON format."
    ),
}

_PAIRS = rf"\({NUMBER},{NUMBER}\){BLANKS},{BLANKS}\({NUMBER},{NUMBER}\)"
#: Text up to the next mark of the notation.
_UNMARKED = r"(?:(?!<\|(?:box|object_ref)_).)*"
_PIECE = re.compile(
    rf"<\|object_ref_start\|>(?P<label>{_UNMARKED})<\|object_ref_end\|>"
    rf"|<\|box_start\|>(?P<box>{_UNMARKED})(?:<\|box_end\|>)?"
    rf"|(?P<bare>{_PAIRS})",
    re.S | re.A,
)
_BOX = re.compile(rf"{BLANKS}{_PAIRS}{BLANKS}", re.A)
_GAP = re.compile(rf"[ \t\n\r]{{{MOST_BLANKS + 1}}}")
_DECIMAL = re.compile(rf"[0-9]{{1,4}}(?:\.[0-9]{{1,{JSON_PLACES}}})?")


def parse_token_boxes(
    text: str,
    width: int,
    height: int,
    label: str = "",
    score: Score = lambda stretches: math.nan,
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many pieces are no box.

    Qwen2-VL's notation. A box belongs to the label before it, and to `label` where there is none.
    An answer without any box counts as one that is none.
    """
    regions: list[Region] = []
    pieces = 0
    for found in _PIECE.finditer(text):
        if found["label"] is not None:
            label = found["label"].strip() or label
            continue
        pieces += 1
        box = _BOX.fullmatch(found["bare"] or found["box"] or "")
        numbers = [float(number) for number in box.groups()] if box else []
        region = region_of(numbers, label, score([found.span()]), width, height)
        if region is not None:
            regions.append(region)
    return tuple(regions), max(1, pieces) - len(regions)


def parse_json_boxes(
    text: str,
    width: int,
    height: int,
    label: str = "",
    score: Score = lambda stretches: math.nan,
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many objects are no box.

    Qwen3-VL's notation, also of a list that was cut off, stands inside an object or gives an object
    several boxes. Numbers are decimals, and an object holds at most `MOST_BLANKS` blanks in a row.
    `label` names boxes that come without one.
    An empty list is a good answer; one without any object counts as one that is none.
    """
    regions: list[Region] = []
    pieces, place = 0, 0
    decoder = json.JSONDecoder(parse_int=_decimal, parse_float=_decimal)
    while (begin := text.find("{", place)) >= 0:
        pieces += 1
        try:
            found, place = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            place = begin + 1  # cut off or damaged: a good one may stand inside or behind
            continue
        if "bbox_2d" not in found and "{" in text[begin + 1 : place]:
            pieces, place = pieces - 1, begin + 1  # an object around the objects
            continue
        numbers, name = found.get("bbox_2d"), found.get("label")
        if _GAP.search(text, begin, place):
            numbers = None
        label_here = name.strip() if isinstance(name, str) and name.strip() else label
        several = isinstance(numbers, list) and all(isinstance(box, list) for box in numbers)
        boxes = numbers if several and numbers else [numbers]
        pieces += len(boxes) - 1
        for box in boxes:
            corners = box if isinstance(box, list) else ()
            region = region_of(corners, label_here, score([(begin, place)]), width, height)
            if region is not None:
                regions.append(region)
    empty = re.fullmatch(r"\s*(?:```(?:json)?)?\s*\[\s*\]\s*(?:```)?\s*", text)
    return tuple(regions), (0 if empty else max(1, pieces)) - len(regions)


def _decimal(text: str) -> float | None:
    """A number of a box; None for what is none, such as one with an exponent."""
    return float(text) if _DECIMAL.fullmatch(text) else None
