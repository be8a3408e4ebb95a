"""What LLaVA-1.5 is asked and what it answers: Vicuna's chat, and boxes of the padded square.

An image is padded to a square before it is made small, so coordinates from 0 to 1 refer to that
square: its side is the image's longer one, and the image lies in its middle. Sentences as in the
published training data (llava_v1_5_mix665k) and conversation template (vicuna_v1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core import ErrorCode, Region, RequestError
from librobot_vlm_ros.models.families import prompts as questions

__all__ = [
    "BEFORE_IMAGE",
    "LLAVA_TASKS",
    "behind_image",
    "pad_to_square",
    "parse_boxes",
    "question",
    "square_numbers",
]

BEFORE_IMAGE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)

#: A task's question; `{text}` stands for the user's words, `{region}` for a box.
LLAVA_TASKS: Mapping[str, str] = {
    "answer": "{text}",
    "caption": "Provide a one-sentence caption for the provided image.",
    "detailed_caption": "Describe the image in detail.",
    "ground": (
        "Please provide the bounding box coordinate of the region this sentence describes: {text}"
    ),
    "region_caption": "Please provide a short description for this region: {region}.",
}

_NUMBER = r"\s*[-+]?(?:\d+(?:\.\d*)?|\.\d+)\s*"
_BOX = re.compile(rf"\[({_NUMBER}),({_NUMBER}),({_NUMBER}),({_NUMBER})\]")
_LIST = re.compile(r"\[[^\[\]]*(?:\]|$|(?=\[))")

Score = Callable[[Sequence[tuple[int, int]]], float]


def behind_image(words: str) -> str:
    """What stands behind the image: the question, and the word after which the answer begins."""
    return f"\n{words} ASSISTANT:"


def question(
    task: str, text: str, region: tuple[float, ...] | None, width: int, height: int
) -> str:
    """A task's question. Raises RequestError EMPTY_PROMPT, BAD_REGION or BAD_PARAMETER."""
    sentence = questions.question(LLAVA_TASKS, task, text)
    if "{region}" not in LLAVA_TASKS[task]:
        return sentence
    if region is None:
        raise RequestError(
            ErrorCode.BAD_REGION, f"{task} needs a region: x_min, y_min, x_max, y_max"
        )
    numbers = (str(round(number, 2)) for number in square_numbers(region, width, height))
    return sentence.replace("{region}", f"[{', '.join(numbers)}]")


def pad_to_square(pixels: npt.NDArray[np.uint8], mean: Sequence[float]) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] in the middle of a square of the mean colour, `mean` from 0 to 1."""
    height, width = pixels.shape[:2]
    if height == width:
        return pixels
    side, left, top = _square(width, height)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [int(value * 255) for value in mean]
    square[top : top + height, left : left + width] = pixels
    return square


def square_numbers(region: Sequence[float], width: int, height: int) -> tuple[float, ...]:
    """A box in source pixels as numbers from 0 to 1 of the padded square."""
    side, left, top = _square(width, height)
    offsets = (left, top, left, top)
    return tuple((value + offset) / side for value, offset in zip(region, offsets, strict=True))


def parse_boxes(
    text: str,
    width: int,
    height: int,
    label: str,
    score: Score = lambda stretches: math.nan,
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many lists are no box of it.

    A box must have four numbers from 0 to 1, the right way round, and meet the image; what of it
    lies in the padding is cut off. An answer without any list counts as one that is none.
    """
    side, left, top = _square(width, height)
    regions: list[Region] = []
    lists = list(_LIST.finditer(text))
    for found in lists:
        box = _BOX.fullmatch(found.group())
        numbers = [float(number) for number in box.groups()] if box else []
        if not numbers or not all(0.0 <= number <= 1.0 for number in numbers):
            continue
        if numbers[0] > numbers[2] or numbers[1] > numbers[3]:
            continue
        x_min, x_max = ((number * side - left) for number in numbers[::2])
        y_min, y_max = ((number * side - top) for number in numbers[1::2])
        if x_min >= width or y_min >= height or x_max <= 0 or y_max <= 0:
            continue
        x_min, x_max = max(x_min, 0.0), min(x_max, float(width))
        y_min, y_max = max(y_min, 0.0), min(y_max, float(height))
        regions.append(Region(label, score([found.span()]), x_min, y_min, x_max, y_max))
    return tuple(regions), max(1, len(lists)) - len(regions)


def _square(width: int, height: int) -> tuple[int, int, int]:
    """Side of the padded square, and where the image's left and upper edge lie in it."""
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2
