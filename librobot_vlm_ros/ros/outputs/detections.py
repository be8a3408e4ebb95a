"""`~/detections`: regions as vision_msgs/Detection2DArray, for all that already speaks it.

vision_msgs is not on PyPI; where it is not installed there is no such topic, and the log says so
once.
"""

from __future__ import annotations

import importlib
from typing import Any

from librobot_vlm_ros.core import Region, Result

__all__ = ["Detections", "detection_array"]


class Detections:
    """The topic, where vision_msgs is installed."""

    def __init__(self, node: Any, profile: Any) -> None:
        self._publisher: Any = None
        try:
            self._messages = importlib.import_module("vision_msgs.msg")
        except ImportError:
            node.get_logger().info("vision_msgs is not installed: there is no ~/detections")
            return
        kind = self._messages.Detection2DArray
        self._publisher = node.create_publisher(kind, "~/detections", profile)

    def publish(self, result: Result, header: Any, min_score: float) -> None:
        """Publish a result with regions, if there is the topic and somebody listens."""
        if self._publisher is None or self._publisher.get_subscription_count() == 0:
            return
        if result.answer is not None:  # an error has no place in this message: it is on ~/grounding
            regions = [item for item in result.answer.regions if not item.score < min_score]
            self._publisher.publish(detection_array(self._messages, regions, header))


def detection_array(messages: Any, regions: list[Region], header: Any) -> Any:
    """The regions under the source image's header; `messages` is the module vision_msgs.msg.

    A region without a score has NaN there, as in our own messages.
    """
    array = messages.Detection2DArray(header=header)
    for region in regions:
        detection = messages.Detection2D(header=header)
        detection.bbox.center.position.x = (region.x_min + region.x_max) / 2
        detection.bbox.center.position.y = (region.y_min + region.y_max) / 2
        detection.bbox.size_x = float(region.x_max - region.x_min)
        detection.bbox.size_y = float(region.y_max - region.y_min)
        result = messages.ObjectHypothesisWithPose()
        result.hypothesis.class_id = region.label
        result.hypothesis.score = float(region.score)
        detection.results.append(result)
        array.detections.append(detection)
    return array
