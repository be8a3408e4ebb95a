"""Qwen-VL's pixels, prompts and answers: patches of any size, sentences, boxes from 0 to 1000."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ImageError, InferenceRequest, ModelError, Region
from librobot_vlm_ros.models.configuration import section, unreadable
from librobot_vlm_ros.models.families.boxes import (
    BLANKS,
    NUMBER,
    RADII,
    marked_boxes,
    region_of,
)
from librobot_vlm_ros.models.families.causal_lm import CausalProcessor
from librobot_vlm_ros.models.generation.constraints.box_syntax import (
    JSON_PLACES,
    MOST_BLANKS,
    SCALE,
    BoxSyntax,
    JsonBoxes,
    TokenBoxes,
)
from librobot_vlm_ros.models.generation.scores import AnswerText, Score, Span, unknown
from librobot_vlm_ros.models.inputs.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    EXACT,
    Resizing,
    channels,
    deviations,
    normalise,
    resize,
)
from librobot_vlm_ros.models.inputs.prompts import question
from librobot_vlm_ros.models.processor import Box, Size

#: Begin and end of a turn of the chat.
BEGIN, END = "<|im_start|>", "<|im_end|>"
HALF = (0.5, 0.5, 0.5)

#: Longest side over the shortest; beyond it the published processor refuses an image.
_MAX_RATIO = 200
#: Four times the largest area that a model of the family was published with.
_MOST_PIXELS = 1 << 26


@dataclass(frozen=True)
class QwenImages:
    """How an image becomes patches."""

    patch: int
    merge: int
    frames: int
    #: Bounds of the resized image's area, pixels.
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < self.factor**2:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels} are no bounds",
                f"expected 0 < min_pixels <= max_pixels, max_pixels at least {self.factor**2}",
            )
        if self.min_pixels > _MOST_PIXELS:  # every image would be enlarged to it
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"min_pixels is {self.min_pixels}, expected at most {_MOST_PIXELS}",
            )

    @property
    def factor(self) -> int:
        """Pixels of a side that become one vector."""
        return self.patch * self.merge

    def to_json(self) -> dict[str, Any]:
        """The settings as preprocessor_config.json holds them."""
        return {
            "do_resize": True,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "patch_size": self.patch,
            "merge_size": self.merge,
            "temporal_patch_size": self.frames,
            "resample": int(self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "image_processor_type": "Qwen2VLImageProcessor",
        }


def qwen_images(config: dict[str, Any], default: QwenImages) -> QwenImages:
    """The settings of a preprocessor_config.json. Raises ModelError BAD_CONFIG."""
    size = section(config, "size", "preprocessor_config.json")
    with unreadable(
        "preprocessor_config.json cannot be used",
        "it needs min_pixels and max_pixels, image_mean and image_std of three numbers each",
    ):
        found = QwenImages(
            patch=int(config.get("patch_size", default.patch)),
            merge=int(config.get("merge_size", default.merge)),
            frames=int(config.get("temporal_patch_size", default.frames)),
            min_pixels=int(
                config.get("min_pixels") or size.get("shortest_edge") or default.min_pixels
            ),
            max_pixels=int(
                config.get("max_pixels") or size.get("longest_edge") or default.max_pixels
            ),
            mean=channels(config.get("image_mean", default.mean)),
            std=deviations(config.get("image_std", default.std)),
            resample=Image.Resampling(int(config.get("resample", default.resample))),
        )
    grid = ("patch", "merge", "frames")
    if any(getattr(found, name) != getattr(default, name) for name in grid):
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            "preprocessor_config.json and config.json state different patches",
            "use the files that came with the weights",
        )
    return found


def smart_size(height: int, width: int, images: QwenImages) -> tuple[int, int]:
    """Height and width that an image is resized to. Raises ImageError BAD_IMAGE for a strip."""
    if min(height, width) < 1 or max(height, width) / min(height, width) > _MAX_RATIO:
        raise ImageError(
            ErrorCode.BAD_IMAGE,
            f"an image of {width}x{height} pixels is too narrow for the model",
            f"its longer side may be {_MAX_RATIO} times the shorter one; cut or pad it",
        )
    factor, area = images.factor, height * width
    # Python rounds halves to even, and so does the published processor.
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if rows * columns > images.max_pixels:
        shrink = math.sqrt(area / images.max_pixels)
        rows, columns = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    elif rows * columns < images.min_pixels:
        grow = math.sqrt(images.min_pixels / area)
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def resized(pixels: npt.NDArray[np.uint8], images: QwenImages, how: Resizing = EXACT) -> Any:
    """uint8 [H, W, 3] of any size to the size that fits the grid; a tensor where `how` resizes on
    CUDA.
    """
    height, width = smart_size(pixels.shape[0], pixels.shape[1], images)
    return resize(pixels, height, width, images.resample, how)


def is_float(image: Any) -> bool:
    """Whether an image is a float tensor [3, H, W], normalised already."""
    return isinstance(image, Tensor) and image.is_floating_point()


def patches(image: Any, images: QwenImages, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Patches [rows * columns, 3 * frames * patch * patch] of one prepared image.

    `image`: uint8 [H, W, 3] from `resized`, or float [3, H, W] normalised already. Patches that
    become one vector stand together.
    """
    if is_float(image):
        values = image.to(device, torch.float32)
    else:
        values = normalise([image], images, device, torch.float32)[0]
    side, merge = images.patch, images.merge
    rows, columns = values.shape[1] // (side * merge), values.shape[2] // (side * merge)
    cells = values.reshape(3, rows, merge, side, columns, merge, side)
    cells = cells.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
    cells = cells.expand(*cells.shape[:5], images.frames, side, side)
    return cells.reshape(rows * columns * merge**2, -1).to(dtype)


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
#: A label's text as it is spelt, the bracket behind the key of boxes, and a number of a box.
_LABEL = re.compile(r'"label"\s*:\s*"((?:[^"\\]|\\.)*)"')
_KEY = re.compile(r'"bbox_2d"\s*:\s*(\[)')
_DIGITS = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_DECIMAL = re.compile(rf"[0-9]{{1,4}}(?:\.[0-9]{{1,{JSON_PLACES}}})?")


def parse_token_boxes(
    text: str, width: int, height: int, label: str = "", score: Score = unknown
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many pieces are no box.

    Qwen2-VL's notation; see `marked_boxes`. A pair of box tokens holds one.
    """

    def only(found: re.Match[str]) -> list[Span]:
        return [found.span("bare" if found["bare"] else "box")]

    return marked_boxes(text, width, height, label, score, piece=_PIECE, box=_BOX, places=only)


def parse_json_boxes(
    text: str, width: int, height: int, label: str = "", score: Score = unknown
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
        named = isinstance(name, str) and bool(name.strip())
        labelled = _last_span(_LABEL, text, begin, place) if named else None
        several = isinstance(numbers, list) and all(isinstance(box, list) for box in numbers)
        boxes = numbers if several and numbers else [numbers]
        pieces += len(boxes) - 1
        spans = _box_spans(text, begin, place)
        for at, box in enumerate(boxes):
            corners = box if isinstance(box, list) else ()
            written = spans[4 * at : 4 * at + 4]
            value = score(labelled, written, RADII, SCALE) if len(written) == 4 else math.nan
            region = region_of(corners, name.strip() if named else label, value, width, height)
            if region is not None:
                regions.append(region)
    empty = re.fullmatch(r"\s*(?:```(?:json)?)?\s*\[\s*\]\s*(?:```)?\s*", text)
    return tuple(regions), (0 if empty else max(1, pieces)) - len(regions)


def _decimal(text: str) -> float | None:
    """A number of a box; None for what is none, such as one with an exponent."""
    return float(text) if _DECIMAL.fullmatch(text) else None


def _last_span(pattern: re.Pattern[str], text: str, begin: int, end: int) -> Span | None:
    """Where the last match's group lies; of a key that comes twice the parser takes the last."""
    found = list(pattern.finditer(text, begin, end))
    return found[-1].span(1) if found else None


def _box_spans(text: str, begin: int, end: int) -> list[Span]:
    """Where the numbers of an object's boxes are written, in order."""
    key = _last_span(_KEY, text, begin, end)
    if key is None:
        return []
    stop, depth = key[1] + 1, 1
    while stop < end and depth:
        depth += {"[": 1, "]": -1}.get(text[stop], 0)
        stop += 1
    return [found.span() for found in _DIGITS.finditer(text, key[1], stop)]


@dataclass(frozen=True)
class Generation:
    """What the two generations of Qwen-VL write and are asked differently."""

    #: What the system says first; "" leaves it out.
    system: str
    #: A question for each task.
    questions: Mapping[str, str]
    box_syntax: BoxSyntax
    #: Reads the notation.
    parse: Callable[..., tuple[tuple[Region, ...], int]]
    #: Image settings where a folder states none.
    images: Mapping[str, Any]


#: By transformers' model_type.
GENERATIONS: Mapping[str, Generation] = {
    "qwen2_vl": Generation(
        "You are a helpful assistant.",
        QWEN2_TASKS,
        TokenBoxes(),
        parse_token_boxes,
        {"min_pixels": 3136, "max_pixels": 12845056, "mean": CLIP_MEAN, "std": CLIP_STD},
    ),
    "qwen3_vl": Generation(
        "",
        QWEN3_TASKS,
        JsonBoxes(),
        parse_json_boxes,
        {"min_pixels": 65536, "max_pixels": 16777216, "mean": HALF, "std": HALF},
    ),
}


class QwenProcessor(CausalProcessor):
    """The processor of Qwen2-VL and Qwen3-VL."""

    one_size = False
    images: QwenImages

    @property
    def generation(self) -> Generation:
        """What differs between the generations."""
        return GENERATIONS[self.config.model_type]

    @property
    def box_syntax(self) -> BoxSyntax:  # type: ignore[override]
        """See `CausalProcessor`."""
        return self.generation.box_syntax

    # Pixels.

    def pixels(self, image: Any, how: Resizing) -> Any:
        """See `Processor`."""
        return resized(image, self.images, how)

    def normalised(self, image: Tensor) -> Tensor:
        """See `CausalProcessor`."""
        factor = self.images.factor
        height, width = image.shape[1:]
        if height % factor or width % factor or not height or not width:
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"a normalised image is {height}x{width}",
                f"{self.name} takes multiples of {factor}; uint8 images of any size are resized",
            )
        return image

    def grid(self, prepared: Any) -> tuple[int, int]:
        """Rows and columns of vectors that a prepared image becomes."""
        height, width = prepared.shape[1:] if is_float(prepared) else prepared.shape[:2]
        return int(height) // self.images.factor, int(width) // self.images.factor

    def count(self, prepared: Any) -> int:
        """See `Processor`."""
        rows, columns = self.grid(prepared)
        return rows * columns

    # Prompts.

    def question(self, task: str, text: str, region: Box | None, size: Size | None) -> str:
        """See `CausalProcessor`."""
        return question(self.generation.questions, task, text)

    def chat(self, words: str, views: int = 1) -> list[int]:
        """See `Processor`; one pair of marks stands for all views."""
        tokenizer, config, system = self.words(), self.config, self.generation.system
        begin, end = (tokenizer.vocabulary[token] for token in (BEGIN, END))
        say = tokenizer.words
        line = say("\n")
        head = [begin, *say(f"system\n{system}"), end, *line] if system else []
        marks = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
        asked = [begin, *say("user\n"), *(marks if views else []), *say(words), end, *line]
        return [*head, *asked, begin, *say("assistant\n")]

    # Answers.

    def suppressed(self) -> list[int]:
        """See `Processor`."""
        return sorted({*super().suppressed(), int(self.config.video_token_id)})

    def regions(
        self, request: InferenceRequest, answer: AnswerText
    ) -> tuple[tuple[Region, ...], int]:
        """See `Processor`."""
        frame, parse = request.frame, self.generation.parse
        return parse(answer.text, frame.width, frame.height, request.prompt, answer.region)
