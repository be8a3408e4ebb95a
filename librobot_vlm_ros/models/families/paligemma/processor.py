"""What PaliGemma is asked and what it answers: prefixes, and boxes of location tokens.

Prefixes as published with the model (Beyer et al., 2024, arXiv:2407.07726). A box is four tokens
``<loc0000>`` to ``<loc1023>`` in the order y_min, x_min, y_max, x_max, in 1024ths of the image's
height and width, then the label; several are parted by ``;``. Sixteen codes ``<seg000>`` to
``<seg127>`` behind a box describe a mask in it (`paligemma_masks`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core import InferenceRequest, Region
from librobot_vlm_ros.models.families.causal_lm import CausalProcessor
from librobot_vlm_ros.models.families.paligemma.masks import (
    CODES,
    TOKENS,
    MaskDecoder,
    draw,
    missing_mask_decoder,
    write_mask_decoder,
)
from librobot_vlm_ros.models.generation.config import CoordinateBins, TokenConstraint
from librobot_vlm_ros.models.generation.constraints.location_tokens import BoxConstraint
from librobot_vlm_ros.models.generation.scores import AnswerText, Score, unknown
from librobot_vlm_ros.models.inputs.preprocess import ImageSettings, Resizing, squash
from librobot_vlm_ros.models.inputs.prompts import question
from librobot_vlm_ros.models.processor import Box, Size

BINS = 1024
#: A task's prefix; `{text}` stands for the user's words.
PALIGEMMA_TASKS: Mapping[str, str] = {
    "answer": "answer en {text}",
    "caption": "caption en",
    "detailed_caption": "describe en",
    "ground": "detect {text}",
    "ocr": "ocr",
    "open_vocabulary_detect": "detect {text}",
    "segment": "segment {text}",
}

_BOX = re.compile(
    r"\s*<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>((?:<seg\d{3}>)*)\s*([^<>]*)"
)
_CODE = re.compile(r"<seg(\d{3})>")
_LISTED = re.compile(r"\s*[;,]\s*")

#: Outlines (x, y), 0 to 1 of the box, of the mask of each sixteen codes.
Draw = Callable[[Sequence[Sequence[int]]], Sequence[Sequence[Sequence[tuple[float, float]]]]]


@dataclass(frozen=True)
class _Piece:
    """A piece between two semicolons that is a box."""

    label: str
    box: tuple[float, float, float, float]
    codes: tuple[int, ...]
    score: float


def parse_locations(
    text: str,
    width: int,
    height: int,
    label: str = "",
    score: Score = unknown,
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many pieces are no box.

    `label` names boxes that come without a label. A box inside out or beyond the last bin counts as
    none, and so does an answer without any.
    """
    pieces = list(_pieces(text, width, height, label, score))
    regions = [Region(piece.label, piece.score, *piece.box) for piece in pieces if piece]
    return tuple(regions), max(1, len(pieces)) - len(regions)


def parse_masks(
    text: str,
    width: int,
    height: int,
    draw: Draw,
    label: str = "",
    score: Score = unknown,
) -> tuple[tuple[Region, ...], int]:
    """Outlined regions in pixels of a width x height image, and how many pieces have no mask.

    Parts of a mask that do not touch are regions of their own. A box counts as none without its
    sixteen codes or with one that does not exist, where it has no area, and where the mask is
    empty.
    """
    pieces = list(_pieces(text, width, height, label, score))
    whole = [piece for piece in pieces if piece and _has_mask(piece)]
    regions: list[Region] = []
    malformed = max(1, len(pieces)) - len(whole)
    for piece, parts in zip(whole, draw([piece.codes for piece in whole]), strict=True):
        malformed += not parts
        x_min, y_min, x_max, y_max = piece.box
        for part in parts:
            polygon = tuple(
                (x_min + x * (x_max - x_min), y_min + y * (y_max - y_min)) for x, y in part
            )
            xs, ys = zip(*polygon, strict=True)
            bounds = min(xs), min(ys), max(xs), max(ys)
            regions.append(Region(piece.label, piece.score, *bounds, polygon))
    return tuple(regions), malformed


def _has_mask(piece: _Piece) -> bool:
    x_min, y_min, x_max, y_max = piece.box
    codes = piece.codes
    return len(codes) == TOKENS and max(codes) < CODES and x_min < x_max and y_min < y_max


def _pieces(
    text: str, width: int, height: int, label: str, score: Score
) -> Iterator[_Piece | None]:
    """Every piece that is not blank; None for one that is no box."""
    begin = 0
    for piece in text.split(";"):
        end = begin + len(piece)
        if piece.strip():
            yield _piece(_BOX.fullmatch(text, begin, end), width, height, label, score)
        begin = end + 1


def _piece(
    found: re.Match[str] | None, width: int, height: int, label: str, score: Score
) -> _Piece | None:
    if found is None:
        return None
    y_min, x_min, y_max, x_max = (int(number) for number in found.groups()[:4])
    if max(y_max, x_max) >= BINS or y_min > y_max or x_min > x_max:
        return None
    x_scale, y_scale = width / BINS, height / BINS
    box = (x_min * x_scale, y_min * y_scale, x_max * x_scale, y_max * y_scale)
    codes = tuple(int(code) for code in _CODE.findall(found.group(5)))
    written = found.group(6).strip()
    value = score(found.span(6) if written else None, [found.span(n) for n in range(1, 5)])
    return _Piece(written or label, box, codes, value)


class PaliGemmaProcessor(CausalProcessor):
    """PaliGemma's processor. `masks`: the decoder of masks, None where there is none."""

    default_new_tokens = 256
    images: ImageSettings

    def __init__(
        self,
        name: str,
        config: Any,
        images: ImageSettings,
        tokenizer: Any = None,
        masks: MaskDecoder | None = None,
    ) -> None:
        super().__init__(name, config, images, tokenizer)
        self.masks = masks

    # Pixels.

    def pixels(self, image: npt.NDArray[np.uint8], how: Resizing) -> Any:
        """See `Processor`."""
        return squash(image, self.images, how)

    def input_size(self, width: int, height: int) -> Size | None:
        """The same for all images."""
        return self.images.width, self.images.height

    def images_json(self) -> dict[str, Any]:
        """See `CausalProcessor`."""
        return {**super().images_json(), "image_processor_type": "SiglipImageProcessor"}

    # Prompts.

    def question(self, task: str, text: str, region: Box | None, size: Size | None) -> str:
        """See `CausalProcessor`."""
        if PALIGEMMA_TASKS[task].startswith(("detect", "segment")):
            text = " ; ".join(part for part in _LISTED.split(text) if part)
        return question(PALIGEMMA_TASKS, task, text)

    def request_ids(self, request: InferenceRequest) -> list[int]:
        """See `Processor`. Raises ModelError WEIGHTS_NOT_FOUND for masks without their decoder."""
        if request.task == "segment" and self.masks is None:
            raise missing_mask_decoder(f"{self.name} has no decoder for its masks")
        return super().request_ids(request)

    def chat(self, words: str, views: int = 1) -> list[int]:
        """See `Processor`; the image stands in front of the begin token."""
        image = [self.config.image_token_id] if views else []
        return [*image, self.config.text_config.bos_token_id, *self.words().words(words + "\n")]

    # Answers.

    def coordinates(self) -> CoordinateBins | None:
        """Locations count as right when they are within 1 % of the image's side."""
        if self.tokenizer is None:
            return None
        return CoordinateBins(self.tokenizer.vocabulary["<loc0000>"], BINS, radius=BINS // 100)

    def constraint(self, task: str) -> TokenConstraint | None:
        """Whole boxes; y and x in turn, so the second corner's bounds are the first one's, too."""
        if not self.writes_regions(task):
            return None
        return BoxConstraint(self.tokenizer.vocabulary["<loc0000>"], BINS)

    def regions(
        self, request: InferenceRequest, answer: AnswerText
    ) -> tuple[tuple[Region, ...], int]:
        """See `Processor`."""
        size, label = (request.frame.width, request.frame.height), request.prompt
        if request.task != "segment":
            return parse_locations(answer.text, *size, label, answer.region)
        assert self.masks is not None  # asked for in `request_ids`
        outlines = functools.partial(draw, self.masks)
        return parse_masks(answer.text, *size, outlines, label, answer.region)

    def save(self, folder: Path) -> None:
        """See `Processor`; the decoder of masks goes with it."""
        super().save(folder)
        if self.masks is not None:
            write_mask_decoder(folder, self.masks)
