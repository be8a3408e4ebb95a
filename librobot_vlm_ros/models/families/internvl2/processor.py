"""InternVL2's pixels, prompts and answers: tiles, internlm2-chat, boxes in thousandths."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from librobot_vlm_ros.core import ErrorCode, ImageError, InferenceRequest, ModelError, Region
from librobot_vlm_ros.models.configuration import unreadable
from librobot_vlm_ros.models.families.boxes import BLANKS, NUMBER, marked_boxes
from librobot_vlm_ros.models.families.causal_lm import CausalProcessor
from librobot_vlm_ros.models.families.internvl2.configuration import tile_tokens
from librobot_vlm_ros.models.generation.constraints.box_syntax import SCALE, ListBoxes
from librobot_vlm_ros.models.generation.scores import AnswerText, Score, Span, unknown
from librobot_vlm_ros.models.inputs.preprocess import (
    EXACT,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Resizing,
    channels,
    deviations,
    resize,
)
from librobot_vlm_ros.models.inputs.prompts import question
from librobot_vlm_ros.models.processor import Box, Size

#: The published models were tried with up to 40 tiles.
_MOST_TILES = 40


@dataclass(frozen=True)
class InternVLImages:
    """How an image becomes tiles."""

    #: Pixels of a tile's side.
    side: int
    max_tiles: int = 12
    min_tiles: int = 1
    thumbnail: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        counts = (self.min_tiles, self.max_tiles)
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in counts)
        if not whole or not 1 <= self.min_tiles <= self.max_tiles <= _MOST_TILES:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"an image may become {self.min_tiles} to {self.max_tiles} tiles",
                f"expected 1 <= min_tiles <= max_tiles <= {_MOST_TILES}",
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as transformers' InternVL folders hold them in preprocessor_config.json."""
        return {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": True,
            "min_patches": self.min_tiles,
            "max_patches": self.max_tiles,
            "use_thumbnail": self.thumbnail,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.side, "width": self.side},
            "resample": int(self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def internvl_images(
    config: dict[str, Any], stated: dict[str, Any], default: InternVLImages
) -> InternVLImages:
    """The settings of a folder, from config.json and preprocessor_config.json ({} without one).

    The official config.json states tiles, transformers' preprocessor_config.json patches; what
    neither states is as in `default`. Raises ModelError BAD_CONFIG.
    """
    if config.get("pad2square"):
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            "config.json asks for images padded to squares (pad2square)",
            "InternVL2 was published without it: use the files that came with the weights",
        )
    most = config.get("max_dynamic_patch", stated.get("max_patches", default.max_tiles))
    least = config.get("min_dynamic_patch", stated.get("min_patches", default.min_tiles))
    if config.get("dynamic_image_size") is False:
        most = least = 1
    size = stated.get("size", default.side)
    with unreadable(
        "preprocessor_config.json cannot be used",
        "it needs size, image_mean and image_std of three numbers each",
    ):
        sides = {*size.values()} if isinstance(size, dict) else {size}
        found = InternVLImages(
            side=default.side,
            max_tiles=most,
            min_tiles=least,
            thumbnail=bool(
                config.get("use_thumbnail", stated.get("use_thumbnail", default.thumbnail))
            ),
            mean=channels(stated.get("image_mean", default.mean)),
            std=deviations(stated.get("image_std", default.std)),
            resample=Image.Resampling(int(stated.get("resample", default.resample))),
        )
    if sides != {default.side}:
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            f"preprocessor_config.json states tiles of {sorted(map(str, sides))} pixels, "
            f"config.json of {default.side}",
            "use the files that came with the weights",
        )
    return found


@functools.lru_cache(maxsize=8)
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Columns and rows of every grid, those of fewer tiles first.

    The original takes grids of one size in the order of a Python set. The order among them makes
    no difference where one tile is allowed: between a grid and another of its size there is always
    a third that comes closer.
    """
    found = (
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if columns * rows >= least
    )
    return tuple(sorted(found, key=lambda shape: shape[0] * shape[1]))


def grid(width: int, height: int, images: InternVLImages) -> tuple[int, int]:
    """Columns and rows of the tiles that a width x height image becomes, no thumbnail counted.

    Among grids of equal proportions a larger one is taken where the image has more than half of
    its pixels. Compared as floats, like the original. Raises ImageError BAD_IMAGE for an image
    without pixels.
    """
    if min(width, height) < 1:
        raise ImageError(ErrorCode.BAD_IMAGE, f"an image of {width}x{height} pixels has none")
    wanted = width / height
    best, smallest = (1, 1), float("inf")
    for columns, rows in _grids(images.min_tiles, images.max_tiles):
        apart = abs(wanted - columns / rows)
        if apart < smallest:
            best, smallest = (columns, rows), apart
        elif apart == smallest and width * height > 0.5 * images.side**2 * columns * rows:
            best = (columns, rows)
    return best


def tiles(
    pixels: npt.NDArray[np.uint8], images: InternVLImages, how: Resizing = EXACT
) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] of any size to tiles [N, side, side, 3], row by row, the thumbnail last.

    Resized in the machine's memory, `fast` or not: the tiles are cut there.
    """
    how = replace(how, device=torch.device("cpu"))
    columns, rows = grid(pixels.shape[1], pixels.shape[0], images)
    side = images.side
    whole = resize(pixels, rows * side, columns * side, images.resample, how)
    cells = whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    if len(cells) > 1 and images.thumbnail:
        small = resize(pixels, side, side, images.resample, how)
        cells = np.concatenate([cells, small[None]])
    return np.asarray(cells)


def float_tiles(image: Tensor, images: InternVLImages) -> Tensor:
    """A normalised image [3, H, W] of any size to tiles [N, 3, side, side], as `tiles` does it.

    Gradients pass through. Values are resized as they are, not rounded to 256 levels before.
    """
    columns, rows = grid(image.shape[2], image.shape[1], images)
    side = images.side

    def resized(height: int, width: int) -> Tensor:
        if image.shape[1:] == (height, width):
            return image
        return functional.interpolate(
            image[None].to(torch.float32), (height, width), mode="bicubic", antialias=True
        )[0]

    whole = resized(rows * side, columns * side)
    cells = whole.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
    if len(cells) > 1 and images.thumbnail:
        cells = torch.cat([cells, resized(side, side)[None].to(cells.dtype)])
    return cells


#: What the system says first in the template internlm2-chat.
SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)

#: Tokens that a task's sentence may hold.
NOTATION = ("<ref>", "</ref>", "<box>", "</box>")

BEGIN, END = "<|im_start|>", "<|im_end|>"
IMAGE_BEGIN, IMAGE, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
_SPLIT = re.compile(f"({'|'.join(map(re.escape, NOTATION))})")

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


def parse_boxes(
    text: str, width: int, height: int, label: str = "", score: Score = unknown
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many lists are no box of it.

    See `marked_boxes`: between a pair of box tokens every list that holds no list is a place.
    """

    def lists(found: re.Match[str]) -> list[Span]:
        if found["bare"]:
            return [found.span("bare")]
        return [one.span() for one in _LIST.finditer(text, *found.span("box"))]

    return marked_boxes(text, width, height, label, score, piece=_PIECE, box=_BOX, places=lists)


class InternVLProcessor(CausalProcessor):
    """InternVL2's processor. A prepared image is its tiles, uint8 [N, side, side, 3] or normalised
    floats [N, 3, side, side].
    """

    one_size = False
    box_syntax = ListBoxes()
    images: InternVLImages

    # Pixels.

    @property
    def image_tokens(self) -> int:
        """Vectors of one tile."""
        return tile_tokens(self.config)

    def pixels(self, image: npt.NDArray[np.uint8], how: Resizing) -> npt.NDArray[np.uint8]:
        """See `Processor`."""
        return tiles(image, self.images, how)

    def normalised(self, image: Tensor) -> Tensor:
        """See `CausalProcessor`."""
        return float_tiles(image, self.images)

    def count(self, prepared: Any) -> int:
        """See `Processor`."""
        return len(prepared) * self.image_tokens

    # Prompts.

    def question(self, task: str, text: str, region: Box | None, size: Size | None) -> str:
        """See `CausalProcessor`; what it holds of `NOTATION` are tokens."""
        numbers = ""
        if region is not None and size is not None:
            sides = (*size, *size)
            scaled = (round(v / side * SCALE) for v, side in zip(region, sides, strict=True))
            numbers = ", ".join(map(str, scaled))
        return question(INTERNVL_TASKS, task, text, numbers)

    def chat(self, words: str, views: int = 1) -> list[int]:
        """See `Processor`: the template internlm2-chat; several images are numbered, as the model
        learnt them.
        """
        tokenizer, config = self.words(), self.config
        say, known = tokenizer.words, tokenizer.vocabulary
        begin, end = known[BEGIN], known[END]
        image = [known[IMAGE_BEGIN], config.image_token_id, known[IMAGE_END]]
        system = getattr(config, "system_message", None) or SYSTEM
        head = [config.text_config.bos_token_id, begin, *say(f"system\n{system}"), end]
        before, asked = "user\n", [begin]
        for view in range(views):
            asked += say(before + (f"Image-{view + 1}: " if views > 1 else "")) + image
            before = "\n"
        for piece in _SPLIT.split(before + words):
            asked += [known[piece]] if piece in NOTATION else say(piece)
        return [*head, *asked, end, begin, *say("assistant\n")]

    # Answers.

    def regions(
        self, request: InferenceRequest, answer: AnswerText
    ) -> tuple[tuple[Region, ...], int]:
        """See `Processor`."""
        frame = request.frame
        return parse_boxes(answer.text, frame.width, frame.height, request.prompt, answer.region)
