"""What LLaVA-1.5 is asked and what it answers: Vicuna's chat, and boxes of the padded square.

An image is padded to a square before it is made small, so coordinates from 0 to 1 refer to that
square: its side is the image's longer one, and the image lies in its middle. Sentences as in the
published training data (llava_v1_5_mix665k) and conversation template (vicuna_v1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core import InferenceRequest, Region
from librobot_vlm_ros.models.families.causal_lm import CausalProcessor
from librobot_vlm_ros.models.generation.scores import AnswerText, Score, unknown
from librobot_vlm_ros.models.inputs.preprocess import ImageSettings, Resizing, squash
from librobot_vlm_ros.models.inputs.prompts import question
from librobot_vlm_ros.models.processor import Box, Size

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

_NUMBER = r"\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+))\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_LIST = re.compile(r"\[[^\[\]]*(?:\]|$|(?=\[))")


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
    score: Score = unknown,
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many lists are no box of it.

    A box must have four numbers from 0 to 1, the right way round, and meet the image; what of it
    lies in the padding is cut off. An answer without any list counts as one that is none.
    """
    side, left, top = _square(width, height)
    radii = (width / side / 100, height / side / 100) * 2
    regions: list[Region] = []
    lists = list(_LIST.finditer(text))
    for found in lists:
        box = _BOX.fullmatch(text, *found.span())
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
        assert box is not None
        written = score(None, [box.span(number) for number in range(1, 5)], radii, 1.0)
        regions.append(Region(label, written, x_min, y_min, x_max, y_max))
    return tuple(regions), max(1, len(lists)) - len(regions)


def _square(width: int, height: int) -> tuple[int, int, int]:
    """Side of the padded square, and where the image's left and upper edge lie in it."""
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


class LlavaProcessor(CausalProcessor):
    """LLaVA-1.5's processor."""

    images: ImageSettings

    # Pixels.

    @property
    def image_tokens(self) -> int:
        """Vectors of an image: one a patch, and the class token where the model keeps it."""
        extra = self.config.vision_feature_select_strategy == "full"
        return super().image_tokens + bool(extra)

    def pixels(self, image: npt.NDArray[np.uint8], how: Resizing) -> Any:
        """See `Processor`."""
        return squash(pad_to_square(image, self.images.mean), self.images, how)

    def input_size(self, width: int, height: int) -> Size | None:
        """The image's part of the padded square."""
        side = max(width, height)
        return (
            math.ceil(width * self.images.width / side),
            math.ceil(height * self.images.height / side),
        )

    def images_json(self) -> dict[str, Any]:
        """See `CausalProcessor`."""
        size = {"height": self.images.height, "width": self.images.width}
        return {
            **super().images_json(),
            "image_processor_type": "LlavaImageProcessor",
            "do_pad": True,
            "size": size,
            "crop_size": size,
        }

    # Prompts.

    def question(self, task: str, text: str, region: Box | None, size: Size | None) -> str:
        """See `CausalProcessor`."""
        numbers = ""
        if region is not None and size is not None:
            scaled = (str(round(number, 2)) for number in square_numbers(region, *size))
            numbers = f"[{', '.join(scaled)}]"
        return question(LLAVA_TASKS, task, text, numbers)

    def chat(self, words: str, views: int = 1) -> list[int]:
        """See `Processor`; one token stands for all views."""
        say, begin = self.words().words, self.config.text_config.bos_token_id
        image = [self.config.image_token_id] if views else []
        return [begin, *say(BEFORE_IMAGE), *image, *say(f"\n{words} ASSISTANT:")]

    # Answers.

    def suppressed(self) -> list[int]:
        """Everything behind the words: image, pad, and the padding of the tables."""
        return list(range(self.config.image_token_id, self.config.text_config.vocab_size))

    def regions(
        self, request: InferenceRequest, answer: AnswerText
    ) -> tuple[tuple[Region, ...], int]:
        """See `Processor`."""
        frame = request.frame
        return parse_boxes(answer.text, frame.width, frame.height, request.prompt, answer.region)
