"""What InternVL2 is asked and what it answers: the internlm2-chat template, boxes in thousandths.

Sentences as published where there are such: the system's from the template, grounding and detection
from the description of the training data, captions from the evaluation (OpenGVLab/InternVL). Labels
stand between ``<ref>`` and ``</ref>``, boxes behind them as ``<box>[[x1, y1, x2, y2], ...]</box>``,
from 0 to 1000 of the image's width and height however it was tiled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from librobot_vlm_ros.core import ErrorCode, Region, RequestError
from librobot_vlm_ros.models import questions
from librobot_vlm_ros.models.boxes import BLANKS, NUMBER, SCALE, Score, region_of

__all__ = ["INTERNVL_TASKS", "NOTATION", "SYSTEM", "parse_boxes", "question"]

#: What the system says first in the template internlm2-chat.
SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)

#: Tokens that a task's sentence may hold.
NOTATION = ("<ref>", "</ref>", "<box>", "</box>")

#: A task's question; `{text}` stands for the user's words, `{region}` for a box.
INTERNVL_TASKS: Mapping[str, str] = {
    "answer": "{text}",
    "caption": "Provide a one-sentence caption for the provided image.",
    "detailed_caption": "Please describe the image in detail.",
    "detect": (
        "Please detect and label all objects in the following image and mark their positions."
    ),
    "ground": (
        "Please provide the bounding box coordinate of the region this sentence describes: "
        "<ref>{text}</ref>"
    ),
    "ocr": "Please read all the text in the image.",
    "open_vocabulary_detect": (
        "Please detect and label all <ref>{text}</ref> in the following image and mark their "
        "positions."
    ),
    "region_caption": (
        "Please provide a short description for this region: <box>[[{region}]]</box>"
    ),
}

_FOUR = rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]"
#: Text up to the next mark of the notation.
_UNMARKED = r"(?:(?!</?(?:box|ref)>).)*"
_PIECE = re.compile(
    rf"<ref>(?P<label>{_UNMARKED})</ref>"
    rf"|<box>(?P<box>{_UNMARKED})(?:</box>)?"
    rf"|(?P<bare>{_FOUR})",
    re.S | re.A,
)
#: A list that holds no list, whole or cut off.
_LIST = re.compile(rf"\[(?!{BLANKS}\[)[^\[\]]*(?:\]|$|(?=\[))", re.A)
_BOX = re.compile(_FOUR, re.A)


def question(task: str, text: str, region: Sequence[float] | None, width: int, height: int) -> str:
    """A task's question; what it holds of `NOTATION` are tokens.

    `region` in pixels of a width x height image. Raises RequestError EMPTY_PROMPT, BAD_REGION or
    BAD_PARAMETER.
    """
    sentence = questions.question(INTERNVL_TASKS, task, text)
    if "{region}" not in INTERNVL_TASKS[task]:
        return sentence
    if region is None:
        raise RequestError(
            ErrorCode.BAD_REGION, f"{task} needs a region: x_min, y_min, x_max, y_max"
        )
    sides = (width, height, width, height)
    numbers = (round(value / side * SCALE) for value, side in zip(region, sides, strict=True))
    return sentence.replace("{region}", ", ".join(map(str, numbers)))


def parse_boxes(
    text: str,
    width: int,
    height: int,
    label: str = "",
    score: Score = lambda stretches: math.nan,
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many lists are no box of it.

    Boxes belong to the label before them, and to `label` where there is none. A pair of box tokens
    without any list counts as a list that is none, and so does an answer without any box.
    """
    regions: list[Region] = []
    pieces = 0
    for found in _PIECE.finditer(text):
        if found["label"] is not None:
            label = found["label"].strip() or label
            continue
        if found["bare"]:
            spans = [found.span("bare")]
        else:
            spans = [one.span() for one in _LIST.finditer(text, *found.span("box"))]
        pieces += max(1, len(spans))
        for begin, end in spans:
            box = _BOX.fullmatch(text, begin, end)
            numbers = [float(number) for number in box.groups()] if box else []
            region = region_of(numbers, label, score([(begin, end)]), width, height)
            if region is not None:
                regions.append(region)
    return tuple(regions), max(1, pieces) - len(regions)
