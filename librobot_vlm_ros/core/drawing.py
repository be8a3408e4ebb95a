"""Regions and words drawn into pictures: for `~/annotated`, `librobot-vlm ask` and the demo."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from librobot_vlm_ros.core.results import Region

Rgb = tuple[int, int, int]

_NAMED: dict[str, Rgb] = {
    "red": (239, 68, 68),
    "yellow": (250, 204, 21),
    "green": (34, 197, 94),
    "cyan": (34, 211, 238),
    "blue": (96, 130, 255),
    "purple": (192, 90, 250),
    "orange": (251, 146, 60),
    "white": (240, 240, 240),
}
_OTHERS: tuple[Rgb, ...] = (
    (251, 146, 60),
    (244, 114, 182),
    (163, 230, 53),
    (45, 212, 191),
    (250, 240, 190),
    (196, 181, 253),
)


def colour_of(label: str) -> Rgb:
    """The colour that a label begins with, else one of a few that stays the same for it."""
    words = label.lower().split()
    if words and words[0] in _NAMED:
        return _NAMED[words[0]]
    return _OTHERS[zlib.crc32(label.lower().encode()) % len(_OTHERS)]


def ink_on(colour: Rgb) -> Rgb:
    """Black or white, whichever reads better on `colour`."""
    red, green, blue = colour
    return (17, 24, 39) if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else (255, 255, 255)


def hexadecimal(colour: Rgb) -> str:
    """`#rrggbb`"""
    return "#{:02x}{:02x}{:02x}".format(*colour)


_DARK: Rgb = (15, 23, 42)
_LIGHT: Rgb = (226, 232, 240)
_MAX_TAG_CHARS = 60
_MAX_CAPTION_CHARS = 2000
_MAX_CAPTION_LINES = 4


def draw(
    pixels: npt.NDArray[np.uint8],
    regions: Iterable[Region],
    caption: str = "",
    *,
    smooth: int = 1,
    strip: bool = False,
) -> npt.NDArray[np.uint8]:
    """A copy of uint8 RGB [H, W, 3] with regions (source pixels), labels, scores and a caption.

    `smooth` draws so many times larger and reduces: Pillow's lines have hard edges. `strip` puts
    the caption below the picture instead of onto its lower edge.
    """
    regions = tuple(regions)
    height, width = pixels.shape[:2]
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if regions:
        size = (width * smooth, height * smooth)
        if smooth > 1:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        canvas = ImageDraw.Draw(picture)
        draw_outlines(canvas, regions, smooth, max(smooth, round(min(size) / 240)))
        draw_tags(canvas, regions, smooth, size, font(round(min(size) / 26)))
        if smooth > 1:
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if caption:
        picture = _captioned(picture, caption, strip)
    return np.asarray(picture)


def draw_outlines(
    canvas: ImageDraw.ImageDraw, regions: Iterable[Region], scale: float, line: int
) -> None:
    """Boxes, and polygons where there are some, in the colours of their labels.

    `scale`: pixels of the canvas for one of the source image.
    """
    for region in regions:
        colour = colour_of(region.label)
        if len(region.polygon) > 2:
            points = [(x * scale, y * scale) for x, y in region.polygon]
            canvas.line([*points, points[0]], fill=colour, width=line, joint="curve")
            # The box of a polygon is there, but must not hide its outline.
            canvas.rectangle(scaled_box(region, scale), outline=colour, width=max(1, line // 2))
            continue
        canvas.rounded_rectangle(
            scaled_box(region, scale), radius=2 * line, outline=colour, width=line
        )


def draw_tags(
    canvas: ImageDraw.ImageDraw,
    regions: Iterable[Region],
    scale: float,
    size: tuple[int, int],
    face: Any,
) -> None:
    """Label and score on each region; `size` is width and height of the canvas."""
    for region in regions:
        colour = colour_of(region.label)
        tag(canvas, scaled_box(region, scale), region_words(region), colour, size, face)


def region_words(region: Region) -> str:
    """Label and score as they stand on a region; without the score where there is none."""
    label = region.label[:_MAX_TAG_CHARS]
    label += "..." if len(region.label) > _MAX_TAG_CHARS else ""
    return label if math.isnan(region.score) else f"{label} {region.score:.2f}".strip()


def scaled_box(region: Region, scale: float) -> tuple[float, float, float, float]:
    """The box in pixels of the canvas, at least one wide and high."""
    x_min, y_min, x_max, y_max = (edge * scale for edge in region.box)
    return (x_min, y_min, max(x_max, x_min + 1), max(y_max, y_min + 1))


def tag(
    canvas: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    words: str,
    colour: Rgb,
    size: tuple[int, int],
    face: Any,
) -> None:
    """A filled label on its box: above it, or inside where there is no room above."""
    if not words:
        return
    words = " ".join(words.split())  # a line end would make it two lines high
    left, top, right, bottom = canvas.textbbox((0, 0), words, font=face)
    width, height = right - left + 12, bottom - top + 10
    x = min(max(0.0, box[0] - 3), max(0.0, size[0] - width))
    y = box[1] - height if box[1] >= height else min(box[1] + 3, size[1] - height)
    canvas.rounded_rectangle((x, y, x + width, y + height), radius=6, fill=colour)
    canvas.text((x + 6 - left, y + 5 - top), words, font=face, fill=ink_on(colour))


def wrapped(text: str, face: Any, width: float, most: int) -> list[str]:
    """At most `most` lines that fit; the last one ends in an ellipsis when there is more."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and face.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    return lines


@functools.lru_cache(maxsize=16)
def font(size: int) -> Any:
    """Pillow's own face, at least 9 pixels high; loading it takes longer than drawing with it."""
    return ImageFont.load_default(max(9, size))


def _captioned(picture: Image.Image, caption: str, strip: bool) -> Image.Image:
    width, height = picture.size
    size = max(9, round(min(width, height) / 26))
    face, gap = font(size), size // 2
    lines = wrapped(caption[:_MAX_CAPTION_CHARS], face, width - 2 * gap, _MAX_CAPTION_LINES)
    band = round(len(lines) * size * 1.3) + gap
    whole = picture
    if strip:
        whole = Image.new("RGB", (width, height + band), _DARK)
        whole.paste(picture, (0, 0))
    canvas = ImageDraw.Draw(whole)
    top = whole.height - band
    canvas.rectangle((0, top, width, whole.height), fill=_DARK)
    for number, line in enumerate(lines):
        y = top + gap // 2 + number * size * 1.3
        canvas.text((gap, y), line, font=face, fill=_LIGHT)
    return whole
