"""Annotated frames as PNG, and one overview picture made of a few of them."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

from librobot_vlm_ros.core.drawing import (
    Rgb,
    draw_outlines,
    draw_tags,
    font,
    scaled_box,
    tag,
    wrapped,
)
from librobot_vlm_ros.demo.data import DemoRun, FrameRecord, duration, spread
from librobot_vlm_ros.demo.scores import missed_objects

_WIDTH = 640  # of an annotated frame, pixels
_SMOOTH = 2  # drawn this much larger and reduced: Pillow's lines have hard edges
_PAPER: Rgb = (15, 23, 42)
_INK: Rgb = (226, 232, 240)
_FAINT: Rgb = (148, 163, 184)
_WHITE: Rgb = (255, 255, 255)


def annotated(frame: FrameRecord, width: int = _WIDTH) -> Image.Image:
    """The frame, `width` pixels wide, with the boxes that were detected (labels and scores), the
    box that the instruction asked for, objects that were missed (dashed), and the caption below.
    """
    height = round(width * frame.pixels.shape[0] / frame.pixels.shape[1])
    scale = width / frame.pixels.shape[1] * _SMOOTH
    size = (width * _SMOOTH, height * _SMOOTH)
    picture = Image.fromarray(frame.pixels).resize(size, Image.Resampling.LANCZOS)
    canvas = ImageDraw.Draw(picture)
    detected = frame.answers.get("detect")
    grounded = frame.answers.get("ground")
    missed = missed_objects(frame) if detected is not None else ()
    for region in missed:
        _dashed(canvas, scaled_box(region, scale), width=2 * _SMOOTH)
    for region in grounded.regions if grounded is not None else ():
        box = scaled_box(region, scale)
        grown = (box[0] - 7, box[1] - 7, box[2] + 7, box[3] + 7)
        # White in a dark rim: seen on light and on dark tables.
        rim = (grown[0] - 3, grown[1] - 3, grown[2] + 3, grown[3] + 3)
        canvas.rounded_rectangle(rim, radius=12, outline=_PAPER, width=2 * _SMOOTH + 6)
        canvas.rounded_rectangle(grown, radius=10, outline=_WHITE, width=2 * _SMOOTH)
    found, face = detected.regions if detected is not None else (), font(round(size[0] / 44))
    draw_outlines(canvas, found, scale, 3 * _SMOOTH)
    draw_tags(canvas, found, scale, size, face)
    for region in missed:
        words = f"missed: {region.label}"
        tag(canvas, scaled_box(region, scale), words, _WHITE, size, face)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return _with_words(picture, frame)


def save_frames(run: DemoRun, folder: Path) -> list[Path]:
    """One PNG a frame; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for frame in run.frames:
        path = folder / f"frame_{frame.number:04d}.png"
        annotated(frame).save(path)  # optimize=True takes ten times as long for 6 %
        paths.append(path)
    return paths


def save_overview(run: DemoRun, path: Path, columns: int = 3, rows: int = 2) -> None:
    """A contact sheet of frames spread over the run."""
    cells = [annotated(frame, 520) for frame in spread(run.frames, columns * rows)]
    if not cells:
        return
    gap = 18
    width, height = cells[0].size
    rows = -(-len(cells) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (30, 41, 59)
    )
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        sheet.paste(cell, (gap + column * (width + gap), gap + row * (height + gap)))
    sheet.save(path)


def _with_words(picture: Image.Image, frame: FrameRecord) -> Image.Image:
    """Caption, instruction and time on a strip below the picture."""
    width, height = picture.size
    big, small = font(round(width / 32)), font(round(width / 42))
    caption = frame.answers.get("caption")
    ground = frame.answers.get("ground")
    words = caption.text if caption is not None and caption.text else "(no caption)"
    lines = wrapped(words, big, width - 24, 2)
    strip = round(width * 0.145)
    whole = Image.new("RGB", (width, height + strip), _PAPER)
    whole.paste(picture, (0, 0))
    canvas = ImageDraw.Draw(whole)
    top = height + round(strip * 0.1)
    for line in lines:
        canvas.text((12, top), line, font=big, fill=_INK)
        top += round(width / 26)
    bottom = height + strip - round(width / 42) - 10
    if ground is not None:
        canvas.text((12, bottom), f"asked for: {ground.prompt}", font=small, fill=_FAINT)
    age_s = max((answer.age_s for answer in frame.answers.values()), default=math.nan)
    note = f"frame {frame.number}" + ("" if math.isnan(age_s) else f"   {duration(age_s)}")
    canvas.text((width - 12, bottom), note, font=small, fill=_FAINT, anchor="ra")
    return whole


def _dashed(
    canvas: ImageDraw.ImageDraw, box: tuple[float, float, float, float], width: int
) -> None:
    x_min, y_min, x_max, y_max = box
    for left in range(round(x_min), round(x_max), 20):
        for y in (y_min, y_max):
            canvas.line((left, y, min(left + 11, x_max), y), fill=_WHITE, width=width)
    for top in range(round(y_min), round(y_max), 20):
        for x in (x_min, x_max):
            canvas.line((x, top, x, min(top + 11, y_max)), fill=_WHITE, width=width)
