"""`~/annotated`: frames with boxes, polygons and the caption drawn in; only while somebody looks.

Drawing has a thread of its own, so that it takes no time from the model; the newest result wins.
"""

from __future__ import annotations

import hashlib
import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image as ImageMessage

from librobot_vlm_ros.core import Frame, Region, Result

from .decoder import Decoder
from .messages import image_message

__all__ = ["Annotator", "draw"]

_COLOURS = (
    (230, 25, 75), (60, 180, 75), (255, 200, 25), (0, 130, 200), (245, 130, 48),
    (145, 30, 180), (70, 220, 220), (240, 50, 230), (170, 220, 60), (250, 150, 170),
)  # fmt: skip


def draw(
    pixels: npt.NDArray[np.uint8], regions: tuple[Region, ...], caption: str = ""
) -> npt.NDArray[np.uint8]:
    """A copy of uint8 RGB [H, W, 3] with the regions (source pixels) and a caption line below drawn
    in.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    canvas = ImageDraw.Draw(picture)
    height, width = pixels.shape[:2]
    line = max(1, round(min(width, height) / 240))
    font = ImageFont.load_default(max(10, round(min(width, height) / 22)))
    for region in regions:
        colour = _COLOURS[hashlib.blake2s(region.label.encode(), digest_size=1).digest()[0] % 10]
        if len(region.polygon) > 2:
            canvas.line([*region.polygon, region.polygon[0]], fill=colour, width=line)
        canvas.rectangle(region.box, outline=colour, width=line)
        score = "" if math.isnan(region.score) else f" {region.score:.2f}"
        _label(canvas, (region.x_min, region.y_min), f"{region.label}{score}", colour, font)
    if caption:
        _label(canvas, (0, height), caption, (20, 20, 20), font, text=(255, 255, 255))
    return np.asarray(picture)


def _label(
    canvas: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    words: str,
    colour: tuple[int, int, int],
    font: Any,
    text: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """A filled label whose lower left corner is at `corner`, moved into the picture where it sticks
    out.
    """
    words = words[:160]
    left, top, right, bottom = canvas.textbbox((0, 0), words, font=font)
    x, y = corner[0], max(0.0, corner[1] - (bottom - top) - 4)
    canvas.rectangle((x, y, x + right - left + 4, y + bottom - top + 4), fill=colour)
    canvas.text((x + 2 - left, y + 2 - top), words, fill=text, font=font)


class Annotator:
    """Publishes annotated frames of all cameras on `~/annotated` under their own headers."""

    def __init__(self, node: Any) -> None:
        self._node = node
        profile = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
        self._publisher = node.create_publisher(ImageMessage, "~/annotated", profile)
        self._worker = Decoder("vlm-annotate")
        self._lock = threading.Lock()
        self._captions: dict[str, str] = {}
        self._regions: dict[str, dict[str, tuple[int, tuple[Region, ...]]]] = {}

    def close(self) -> None:
        """Stop drawing and take the topic away."""
        self._worker.close()
        self._node.destroy_publisher(self._publisher)

    @property
    def watched(self) -> bool:
        """Whether anybody subscribes."""
        return bool(self._publisher.get_subscription_count())

    def put(self, result: Result, frame: Frame) -> None:
        """Draw this result soon, together with the other results of its frame, if somebody
        subscribes.
        """
        if result.answer is None or not self.watched:
            return
        camera, task = frame.camera, result.info.task
        with self._lock:
            if result.answer.regions or result.info.task in self._regions.get(camera, {}):
                self._regions.setdefault(camera, {})[task] = (frame.sequence, result.answer.regions)
            elif result.answer.text:
                self._captions[camera] = result.answer.text
            caption = self._captions.get(camera, "")
            drawn = tuple(
                region
                for sequence, regions in self._regions.get(camera, {}).values()
                if sequence == frame.sequence
                for region in regions
            )
        self._worker.put(camera, lambda: self._draw(frame, drawn, caption))

    def _draw(self, frame: Frame, regions: tuple[Region, ...], caption: str) -> None:
        pixels = frame.pixels
        if pixels.shape[:2] != (frame.height, frame.width):  # decoded before anybody looked
            picture = Image.fromarray(np.ascontiguousarray(pixels))
            pixels = np.asarray(picture.resize((frame.width, frame.height)))
        self._publisher.publish(image_message(draw(pixels, regions, caption), frame.header))
