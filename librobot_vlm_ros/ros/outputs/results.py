"""Results out: one message per result, by what its task gives, under the source image's own header.

`~/caption`, `~/grounding` and `~/embedding` are this package's messages; `~/detections` has the
regions as vision_msgs/Detection2DArray, for all that already speaks it.
"""

from __future__ import annotations

import array
import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from geometry_msgs.msg import Point32
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import Header

from librobot_vlm_ros.core import (
    Frame,
    InferenceInfo,
    Region,
    Result,
    escape_for_log,
    get_task,
)
from librobot_vlm_ros.msg import Caption, Embedding, GroundedRegion, GroundingArray
from librobot_vlm_ros.msg import InferenceInfo as InfoMessage
from librobot_vlm_ros.ros.outputs.annotated import Annotator
from librobot_vlm_ros.runtime import with_age

# Reliable serves every subscriber, also those that ask for best effort.
_RESULTS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=10,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
)
_UINT32_MAX = 2**32 - 1


class ResultPublisher:
    """The result topics of the node. `publish` is called on the engine's thread."""

    def __init__(self, node: Any, min_score: Callable[[], float]) -> None:
        self._min_score = min_score
        self._caption = node.create_publisher(Caption, "~/caption", _RESULTS)
        self._grounding = node.create_publisher(GroundingArray, "~/grounding", _RESULTS)
        self._embedding = node.create_publisher(Embedding, "~/embedding", _RESULTS)
        self._detections: Any = None  # where vision_msgs is installed: it is not on PyPI
        try:
            self._vision = importlib.import_module("vision_msgs.msg")
        except ImportError:
            node.get_logger().info("vision_msgs is not installed: there is no ~/detections")
        else:
            kind = self._vision.Detection2DArray
            self._detections = node.create_publisher(kind, "~/detections", _RESULTS)
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
            # An error has no place in a detection message: it is on ~/grounding.
            if result.ok and self._detections and self._detections.get_subscription_count():
                regions = _scored(result, self._min_score())
                self._detections.publish(detection_array(self._vision, regions, message.header))
        else:
            self._embedding.publish(embedding_message(result))
        if self._annotator is not None:
            self._annotator.put(result, frame)


def result_text(result: Result, frame: Frame, now_ns: int) -> str:
    """One line about a result, for the debug log."""
    answer, info = result.answer, result.info
    what = "no answer" if answer is None else f"'{escape_for_log(answer.text)}'"
    if answer is not None and answer.regions:
        what = ", ".join(escape_for_log(region.label) for region in answer.regions)
    return (
        f"{info.request_id}: {what} (batch of {info.batch_size}, model {info.inference_s:.3f} s, "
        f"frame {(now_ns - frame.received_ns) * 1e-9:.3f} s old)"
    )


def info_message(info: InferenceInfo) -> InfoMessage:
    """`InferenceInfo`, field for field."""
    bounded = {
        "instruction_id": info.instruction_id & _UINT32_MAX,
        "age_s": max(0.0, info.age_s),
    }
    return InfoMessage(**dataclasses.asdict(info) | bounded)


def caption_message(result: Result) -> Caption:
    """A text result, or its error."""
    message = Caption(**_common(result))
    message.score = math.nan
    if result.answer is not None:
        message.text = result.answer.text
        message.score = float(result.answer.score)
    return message


def grounding_message(result: Result, min_score: float = 0.0) -> GroundingArray:
    """A result with regions, or its error; those scored below `min_score` are left out."""
    message = GroundingArray(**_common(result))
    message.image_width = result.image_width
    message.image_height = result.image_height
    if result.answer is not None:
        message.malformed = result.answer.malformed
        message.regions = [_region_message(region) for region in _scored(result, min_score)]
    return message


def embedding_message(result: Result) -> Embedding:
    """An embedding result, or its error."""
    message = Embedding(**_common(result))
    if result.answer is not None and result.answer.embedding is not None:
        tensor = result.answer.embedding.array
        little = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
        message.pooling = result.answer.embedding.pooling
        message.dtype = tensor.dtype.name
        message.shape = [int(length) for length in tensor.shape]
        # The one assignment to a uint8[] field that rclpy does not check element by element.
        message.data = array.array("B", little.tobytes())
    return message


def _region_message(region: Region) -> GroundedRegion:
    return GroundedRegion(
        label=region.label,
        score=float(region.score),
        x_min=float(region.x_min),
        y_min=float(region.y_min),
        x_max=float(region.x_max),
        y_max=float(region.y_max),
        polygon=[Point32(x=float(x), y=float(y), z=0.0) for x, y in region.polygon],
    )


def _common(result: Result) -> dict[str, Any]:
    header = result.frame_header if isinstance(result.frame_header, Header) else Header()
    return {
        "header": header,
        "info": info_message(result.info),
        "error_code": result.error_code,
        "error_msg": result.error_msg,
    }


def _scored(result: Result, min_score: float) -> list[Region]:
    """The regions that are not scored below `min_score`; NaN, no score, is below nothing."""
    regions = () if result.answer is None else result.answer.regions
    return [region for region in regions if not region.score < min_score]


def detection_array(messages: Any, regions: Sequence[Region], header: Any) -> Any:
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
