"""Qwen-VL's pixels, prompts and answers: patches of any size, sentences, boxes from 0 to 1000."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ImageError, ModelError, Region
from librobot_vlm_ros.models.configuration import section, unreadable
from librobot_vlm_ros.models.families.boxes import BLANKS, MOST_BLANKS, NUMBER, Score, region_of
from librobot_vlm_ros.models.families.preprocess import (
    EXACT,
    Resizing,
    channels,
    deviations,
    normalise,
    resize,
)
from librobot_vlm_ros.models.generation.constraints.box_syntax import JSON_PLACES

__all__ = [
    "QWEN2_TASKS",
    "QWEN3_TASKS",
    "QwenImages",
    "is_float",
    "parse_json_boxes",
    "parse_token_boxes",
    "patches",
    "qwen_images",
    "resized",
    "smart_size",
]

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
    height, width = smart_size(*pixels.shape[:2], images)
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
