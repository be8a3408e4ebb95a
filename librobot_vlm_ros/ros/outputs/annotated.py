"""`~/annotated`: frames with boxes, polygons and the caption drawn in; only while somebody looks.

Drawing has a thread of its own, so that it takes no time from the model; the newest result wins.
"""

from __future__ import annotations

import array
import threading
from typing import Any

import numpy as np
from PIL import Image
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image as ImageMessage

from librobot_vlm_ros.core import Frame, Region, Result
from librobot_vlm_ros.core.drawing import draw
from librobot_vlm_ros.ros.latest_worker import LatestWorker


class Annotator:
    """Publishes annotated frames of all cameras on `~/annotated` under their own headers."""

    def __init__(self, node: Any) -> None:
        self._node = node
        profile = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
        self._publisher = node.create_publisher(ImageMessage, "~/annotated", profile)
        self._worker = LatestWorker("vlm-annotate")
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
        """Draw this result soon, with the others of its frame, if somebody subscribes."""
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
        self._publisher.publish(_image_message(draw(pixels, regions, caption), frame.header))


def _image_message(pixels: np.ndarray, header: Any) -> ImageMessage:
    """`sensor_msgs/Image` (rgb8) of uint8 RGB [H, W, 3] under the given header."""
    message = ImageMessage(header=header, encoding="rgb8", is_bigendian=0)
    message.height, message.width = int(pixels.shape[0]), int(pixels.shape[1])
    message.step = message.width * 3
    message.data = array.array("B", np.ascontiguousarray(pixels).tobytes())
    return message
