"""What PaliGemma is asked and what it answers: prefixes, and boxes of location tokens.

Prefixes as published with the model (Beyer et al., 2024, arXiv:2407.07726). A box is four tokens
``<loc0000>`` to ``<loc1023>`` in the order y_min, x_min, y_max, x_max, in 1024ths of the image's
height and width, then the label; several are parted by ``;``. Sixteen codes ``<seg000>`` to
``<seg127>`` behind a box describe a mask in it (`paligemma_masks`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.models.families import prompts as questions

__all__ = ["BINS", "PALIGEMMA_TASKS", "parse_locations", "parse_masks", "question"]

BINS = 1024
#: Entries of the codebook of masks, and codes of a mask.
CODES, TOKENS = 128, 16
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

Score = Callable[[Sequence[tuple[int, int]]], float]
#: Outlines (x, y), 0 to 1 of the box, of the mask of each sixteen codes.
Draw = Callable[[Sequence[Sequence[int]]], Sequence[Sequence[Sequence[tuple[float, float]]]]]


@dataclass(frozen=True)
class _Piece:
    """A piece between two semicolons that is a box."""

    label: str
    box: tuple[float, float, float, float]
    codes: tuple[int, ...]
    score: float


def question(task: str, text: str) -> str:
    """A task's prefix. Raises RequestError EMPTY_PROMPT or BAD_PARAMETER."""
    if PALIGEMMA_TASKS[task].startswith(("detect", "segment")):
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
    pieces = list(_pieces(text, width, height, label, score))
    regions = [Region(piece.label, piece.score, *piece.box) for piece in pieces if piece]
    return tuple(regions), max(1, len(pieces)) - len(regions)


def parse_masks(
    text: str,
    width: int,
    height: int,
    draw: Draw,
    label: str = "",
    score: Score = lambda stretches: math.nan,
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
            yield _piece(piece, width, height, label, score([(begin, end)]))
        begin = end + 1


def _piece(text: str, width: int, height: int, label: str, score: float) -> _Piece | None:
    found = _BOX.fullmatch(text)
    if not found:
        return None
    y_min, x_min, y_max, x_max = (int(number) for number in found.groups()[:4])
    if max(y_max, x_max) >= BINS or y_min > y_max or x_min > x_max:
        return None
    x_scale, y_scale = width / BINS, height / BINS
    box = (x_min * x_scale, y_min * y_scale, x_max * x_scale, y_max * y_scale)
    codes = tuple(int(code) for code in _CODE.findall(found.group(5)))
    return _Piece(found.group(6).strip() or label, box, codes, score)
