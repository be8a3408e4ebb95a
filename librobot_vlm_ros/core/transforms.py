"""From the coordinates of a model's input back to pixels of the source image.

Preprocessing resizes, pads, crops and tiles. Each step keeps the axes apart, so any sequence of
them is `model = source * scale + offset` for x and for y. Scale and offset are kept as fractions:
however many steps there were, a coordinate is rounded once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from librobot_vlm_ros.core.errors import ErrorCode, RequestError
from librobot_vlm_ros.core.geometry import clip_box
from librobot_vlm_ros.core.requests import Box

__all__ = ["ImageTransform"]


def _fraction(value: float | Fraction) -> Fraction:
    if not math.isfinite(value):
        raise RequestError(ErrorCode.BAD_REGION, f"coordinate is {value}, expected a finite number")
    return Fraction(value)


def _positive(**sides: int) -> None:
    for name, value in sides.items():
        if value < 1:
            raise RequestError(
                ErrorCode.BAD_PARAMETER, f"{name} is {value} pixels, expected at least 1"
            )


@dataclass(frozen=True)
class ImageTransform:
    """What was done to an image, so that it can be undone for coordinates.

    Coordinates are continuous: pixel i of a row reaches from i to i + 1. Build one from `of(width,
    height)` with the steps in their order:

        tile = ImageTransform.of(1920, 1080).resize(1344, 896).crop(448, 0, 448, 448)
        box = tile.box_to_source((0, 0, 448, 448))
    """

    source_width: int
    source_height: int
    width: int
    """Width of the model's input, pixels."""
    height: int
    scale_x: Fraction = Fraction(1)
    scale_y: Fraction = Fraction(1)
    offset_x: Fraction = Fraction(0)
    offset_y: Fraction = Fraction(0)

    @classmethod
    def of(cls, width: int, height: int) -> ImageTransform:
        """Nothing done yet to an image of this size. `RequestError` (BAD_PARAMETER) below 1x1."""
        _positive(width=width, height=height)
        return cls(width, height, width, height)

    def resize(self, width: int, height: int) -> ImageTransform:
        """After a resize of the whole image to this size."""
        _positive(width=width, height=height)
        by_x, by_y = Fraction(width, self.width), Fraction(height, self.height)
        return replace(
            self,
            width=width,
            height=height,
            scale_x=self.scale_x * by_x,
            scale_y=self.scale_y * by_y,
            offset_x=self.offset_x * by_x,
            offset_y=self.offset_y * by_y,
        )

    def pad(self, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> ImageTransform:
        """After adding that many pixels at each side (negative ones cut)."""
        width, height = self.width + left + right, self.height + top + bottom
        _positive(width=width, height=height)
        return replace(
            self,
            width=width,
            height=height,
            offset_x=self.offset_x + left,
            offset_y=self.offset_y + top,
        )

    def crop(self, x: int, y: int, width: int, height: int) -> ImageTransform:
        """After cutting out the part of this size at (x, y): a crop, or one tile of several."""
        return self.pad(-x, -y, x + width - self.width, y + height - self.height)

    def to_source(self, x: float | Fraction, y: float | Fraction) -> tuple[float, float]:
        """A point of the model's input in source pixels, correctly rounded; not cut to the image.

        Raises `RequestError` (BAD_REGION) for a coordinate that is not finite.
        """
        return (
            float((_fraction(x) - self.offset_x) / self.scale_x),
            float((_fraction(y) - self.offset_y) / self.scale_y),
        )

    def to_model(self, x: float | Fraction, y: float | Fraction) -> tuple[float, float]:
        """A point of the source image in pixels of the model's input."""
        return (
            float(_fraction(x) * self.scale_x + self.offset_x),
            float(_fraction(y) * self.scale_y + self.offset_y),
        )

    def box_to_source(self, box: Sequence[float | Fraction], *, clip: bool = True) -> Box:
        """A box of the model's input in source pixels, by default cut to the source image."""
        corners = (*self.to_source(box[0], box[1]), *self.to_source(box[2], box[3]))
        return clip_box(corners, self.source_width, self.source_height) if clip else corners

    def box_to_model(self, box: Sequence[float | Fraction]) -> Box:
        """A box of the source image in pixels of the model's input."""
        return (*self.to_model(box[0], box[1]), *self.to_model(box[2], box[3]))

    def from_grid(self, x: float, y: float, bins: int, shift: float = 0.0) -> tuple[float, float]:
        """A point given in bins (`bins` across each side of the model's input) in source pixels.

        `shift` 0.5 takes the centre of a bin (Florence-2, 1000 bins); 0 its left edge (0 to 1000 of
        Qwen-VL and InternVL2, 1024 of PaliGemma, `bins=1` for LLaVA's fractions).
        """
        _positive(bins=bins)
        unit_x, unit_y = Fraction(self.width, bins), Fraction(self.height, bins)
        moved = _fraction(shift)
        return self.to_source((_fraction(x) + moved) * unit_x, (_fraction(y) + moved) * unit_y)
