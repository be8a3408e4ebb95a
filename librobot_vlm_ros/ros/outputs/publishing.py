"""Results out: one message per result, by what its task gives, under the source's own header."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from librobot_vlm_ros.core import Frame, Result, get_task
from librobot_vlm_ros.msg import Caption, Embedding, GroundingArray
from librobot_vlm_ros.ros.outputs.annotated import Annotator
from librobot_vlm_ros.ros.outputs.detections import Detections
from librobot_vlm_ros.ros.outputs.messages import (
    caption_message,
    embedding_message,
    grounding_message,
)
from librobot_vlm_ros.runtime import with_age

__all__ = ["ResultPublisher"]

# Reliable serves every subscriber, also those that ask for best effort.
_RESULTS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=10,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
)


class ResultPublisher:
    """The result topics of the node. `publish` is called on the engine's thread."""

    def __init__(self, node: Any, min_score: Callable[[], float]) -> None:
        self._min_score = min_score
        self._caption = node.create_publisher(Caption, "~/caption", _RESULTS)
        self._grounding = node.create_publisher(GroundingArray, "~/grounding", _RESULTS)
        self._embedding = node.create_publisher(Embedding, "~/embedding", _RESULTS)
        self._detections = Detections(node, _RESULTS)
        self._annotator: Annotator | None = None

    def set_annotator(self, annotator: Annotator | None) -> None:
        """Draw results with `annotator` from now on; None stops that."""
        self._annotator = annotator

    def publish(self, result: Result, frame: Frame, now_ns: int) -> None:
        """Publish one result; `now_ns` is the steady clock, for the age at publication."""
        result = with_age(result, frame, now_ns)
        output = get_task(result.info.task).output
        if output == "text":
            self._caption.publish(caption_message(result))
        elif output == "regions":
            message = grounding_message(result, self._min_score())
            self._grounding.publish(message)
            self._detections.publish(result, message.header, self._min_score())
        else:
            self._embedding.publish(embedding_message(result))
        if self._annotator is not None:
            self._annotator.put(result, frame)
