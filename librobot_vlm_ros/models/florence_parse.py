"""What Florence-2 answers: text with location tokens, read into regions of the source image.

``red cube<loc_10><loc_20><loc_300><loc_400>`` is a label with a box in thousandths of the image.
Coordinates are given as the centre of their bin, (bin + 0.5) * size / 1000, as floats. What can't
be read as a region is counted, never guessed: a box that lacks a coordinate or is inside out, a
label without a box, a polygon of fewer than three points.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.models.florence_prompts import BINS, Answer

__all__ = ["NOT_GROUNDED", "parse_answer", "without_locations"]

#: Score of stretches (begin, end) of the answer's text.
Score = Callable[[Sequence[tuple[int, int]]], float]

_TOKEN = re.compile(
    r"<loc_(?P<loc>\d{1,6})>|<(?P<mark>/?poly|sep)>"
    r"|<(?:/?s|pad|unk|/?od|/?ocr|/?cap|/?ncap|/?dcap|/?grounding|/?seg|/?region_cap"
    r"|/?region_to_desciption|/?proposal|and|ground|obj)>"
    r"|(?P<text>[^<]+|<)"
)
_LOCATIONS = re.compile(r"\s*(?:<loc_\d+>)+\s*")

#: Words that the published post-processing does not take for objects when grounding a caption.
NOT_GROUNDED = frozenset(
    [
        "it",
        "I",
        "me",
        "mine",
        "you",
        "your",
        "yours",
        "he",
        "him",
        "his",
        "she",
        "her",
        "hers",
        "they",
        "them",
        "their",
        "theirs",
        "one",
        "oneself",
        "we",
        "us",
        "our",
        "ours",
        "its",
        "myself",
        "yourself",
        "himself",
        "herself",
        "itself",
        "ourselves",
        "yourselves",
        "themselves",
        "this",
        "that",
        "these",
        "those",
        "who",
        "whom",
        "whose",
        "which",
        "what",
        "all",
        "another",
        "any",
        "anybody",
        "anyone",
        "anything",
        "each",
        "everybody",
        "everyone",
        "everything",
        "few",
        "many",
        "nobody",
        "none",
        "several",
        "some",
        "somebody",
        "someone",
        "something",
        "image",
        "images",
        "the",
        "a",
        "an",
        "lots",
    ]
) | {"each other", "one another", "the image", "a group", "other objects", "a set"}


@dataclass
class _Piece:
    """A label and the runs of locations behind it; each run is a list of (bin, begin, end)."""

    words: str = ""
    span: tuple[int, int] = (0, 0)
    runs: list[list[tuple[int, int, int]]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.words.strip()


def parse_answer(
    text: str,
    answer: Answer,
    width: int,
    height: int,
    *,
    score: Score = lambda stretches: math.nan,
    default_label: str = "",
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many pieces could not be read.

    `default_label` names polygons, which the model writes without a label.
    """
    if answer == "text":
        return (), 0
    polygons = answer == "polygons" or (answer == "boxes_or_polygons" and "<poly>" in text)
    reader = _Reader(width, height, score)
    for piece in _pieces(text):
        if polygons:
            reader.polygons(piece, piece.label or default_label)
        elif answer == "quads":
            reader.quad(piece)
        elif answer == "grounding" and piece.label in NOT_GROUNDED:
            continue
        else:
            reader.boxes(piece, label_needed=answer != "proposals")
    return tuple(reader.regions), reader.malformed


def without_locations(text: str) -> str:
    """The words of an answer, location tokens left out."""
    return _LOCATIONS.sub(" ", text).strip()


def _pieces(text: str) -> Iterator[_Piece]:
    piece = _Piece()
    broken = True  # whether the next location begins a run of its own
    for match in _TOKEN.finditer(text):
        if (location := match["loc"]) is not None:
            if broken:
                piece.runs.append([])
                broken = False
            piece.runs[-1].append((int(location), match.start(), match.end()))
        elif (words := match["text"]) is not None:
            if not words.strip():
                continue
            if piece.runs:
                yield piece
                piece = _Piece()
            piece.span = (piece.span[0] if piece.words else match.start(), match.end())
            piece.words += words
            broken = True
        elif match["mark"]:
            broken = True
    if piece.label or piece.runs:
        yield piece


class _Reader:
    """Collects regions and counts what is none."""

    def __init__(self, width: int, height: int, score: Score) -> None:
        self.regions: list[Region] = []
        self.malformed = 0
        self._scale = (width / BINS, height / BINS)
        self._score = score

    def boxes(self, piece: _Piece, *, label_needed: bool) -> None:
        """Every four locations are a box of the label."""
        locations = [location for run in piece.runs for location in run]
        self._count_rest(locations, 4)
        for begin in range(0, len(locations) - 3, 4):
            corners = locations[begin : begin + 4]
            points = self._points(corners)
            if (label_needed and not piece.label) or not points or not _is_box(points):
                self.malformed += 1
                continue
            self._add(piece, piece.label, points, corners, outlined=False)

    def quad(self, piece: _Piece) -> None:
        """Eight locations behind a text are the corners of where it is written."""
        locations = [location for run in piece.runs for location in run]
        corners = locations[:8]
        self._count_rest(locations, 8)
        self.malformed += max(0, len(locations) // 8 - 1)  # a text is written in one place
        if len(corners) < 8:
            return
        points = self._points(corners)
        if not piece.label or not points:
            self.malformed += 1
            return
        self._add(piece, piece.label, points, corners, outlined=True)

    def polygons(self, piece: _Piece, label: str) -> None:
        """Every run of locations is a polygon."""
        if not piece.runs:
            self.malformed += 1
        for run in piece.runs:
            points = self._points(run[: len(run) // 2 * 2])
            if len(points) < 3:
                self.malformed += 1
                continue
            self.malformed += len(run) % 2  # half a point is left over
            self._add(piece, label, points, run, outlined=True)

    def _count_rest(self, locations: Sequence[object], size: int) -> None:
        """A label without locations, and locations that make no whole shape, count as one each."""
        self.malformed += 1 if not locations or len(locations) % size else 0

    def _points(self, locations: Sequence[tuple[int, int, int]]) -> list[tuple[float, float]]:
        """Pixels of pairs of bins; nothing when a bin does not exist."""
        if any(location[0] >= BINS for location in locations):
            return []
        values = [
            (location[0] + 0.5) * self._scale[place % 2] for place, location in enumerate(locations)
        ]
        return list(zip(values[::2], values[1::2], strict=True))

    def _add(
        self,
        piece: _Piece,
        label: str,
        points: Sequence[tuple[float, float]],
        locations: Sequence[tuple[int, int, int]],
        *,
        outlined: bool,
    ) -> None:
        stretches = [(begin, end) for _, begin, end in locations]
        if piece.label:
            stretches.append(piece.span)
        self.regions.append(
            Region(
                label=label,
                score=self._score(stretches),
                x_min=min(x for x, _ in points),
                y_min=min(y for _, y in points),
                x_max=max(x for x, _ in points),
                y_max=max(y for _, y in points),
                polygon=tuple(points) if outlined else (),
            )
        )


def _is_box(points: Sequence[tuple[float, float]]) -> bool:
    (x_min, y_min), (x_max, y_max) = points
    return x_min <= x_max and y_min <= y_max
